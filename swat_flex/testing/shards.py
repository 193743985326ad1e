"""`sharded`: a sequence cut into shards, attended one after the other as the ranks of a mesh do at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from swat_flex.api import flex_swat
from swat_flex.distributed.attend import attend_shard
from swat_flex.distributed.exchange import Exchange, Keys
from swat_flex.distributed.shards import halo_of
from swat_flex.problem import WindowLike
from swat_flex.window import Window


class _Here(Exchange):
    """Keys of other shards without messages: slices of the whole, to which autograd returns their gradients."""

    def __init__(self, halo: list[Keys]) -> None:
        self.pieces = halo

    def begin(self, own: Keys) -> tuple[Keys, Tensor]:
        return own, own[0]

    def end(self, token: Tensor) -> list[Keys]:
        return self.pieces

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        yield


def sharded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: WindowLike,
    *,
    ranks: int,
    seed: int,
    document_ids: Tensor | None,
    **options: Any,
) -> Tensor:
    """`flex_swat` of `ranks` shards whose lengths, 0 among them, follow from a seed; with as many queries as keys."""
    draw = torch.Generator().manual_seed(seed + 4)
    cuts = torch.randint(0, k.shape[2] + 1, (ranks - 1,), generator=draw).sort().values.tolist()
    borders = [0, *cuts, k.shape[2]]
    lengths = tuple(stop - start for start, stop in itertools.pairwise(borders))

    def keys(start: int, stop: int) -> Keys:
        ids = None if document_ids is None else document_ids[..., start:stop]
        return k[:, :, start:stop], v[:, :, start:stop], ids

    def attend(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None) -> Tensor:
        return flex_swat(q, k, v, window, document_ids=ids, **options)

    parts = []
    for rank, (start, stop) in enumerate(itertools.pairwise(borders)):
        halo = halo_of(rank, lengths, Window.of(window))
        pieces = [keys(borders[x.peer] + x.start, borders[x.peer] + x.stop) for x in halo.received]
        shard = q[:, :, start:stop]
        parts.append(attend_shard(shard, keys(start, stop), Window.of(window), halo, _Here(pieces), attend))
    return torch.cat(parts, 2)
