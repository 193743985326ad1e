"""A case decoded: its keys go through a `RingCache`, in chunks and among skipped tokens, before its queries attend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swat_flex.decode import RingCache, swat_decode

NAN = float("nan")


def decoded(
    inputs: tuple[Tensor, Tensor, Tensor], window: int, queries: int, seed: int, backend: Any, options: dict[str, Any]
) -> Tensor:
    """`swat_decode` of q as the newest tokens of k and v.

    Tokens whose document id is negative never existed: rows of the batch have lengths of their own. What no query sees,
    a slot not yet reached, a token too old, a skipped one, is NaN.

    Args:
        inputs: q `[B, Hq, T, D]`, k and v `[B, Hkv, L, ·]`, on one device.
        queries: of the cache, at least T.
        seed: of the chunks' sizes and of the tokens skipped between those that count.
        options: of `flex_swat`; document ids `[B, L]` negative at the left, or None.
    """
    q, k, v = inputs
    batch, heads, length, _ = k.shape
    draw = torch.Generator().manual_seed(seed + 3)
    options = {name: x for name, x in options.items() if name != "activation"}
    ids = options.pop("document_ids")
    cache = RingCache(batch, heads, window, k.shape[3], v.shape[3], k.dtype, k.device, queries=queries)
    cache.keys.fill_(NAN), cache.values.fill_(NAN)
    mask = None
    if ids is not None:
        k, v, mask = _among_skipped(k, v, ids.cpu() >= 0, draw)
    start, total = 0, k.shape[2]
    while start < total:
        stop = min(total, start + int(torch.randint(1, max(2, length), (), generator=draw)))
        cache.append(k[:, :, start:stop], v[:, :, start:stop], None if mask is None else mask[:, start:stop])
        start = stop
    _poison(cache, q.shape[2])
    return swat_decode(q, cache, backend=backend, **options)


def _among_skipped(k: Tensor, v: Tensor, kept: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values that count in their order among others that are NaN, and the mask `[B, total]` of those."""
    batch, length = kept.shape
    total = length + int(torch.randint(0, length + 1, (), generator=draw))
    mask = torch.zeros(batch, total, dtype=torch.bool)
    spread = [torch.full((*x.shape[:2], total, x.shape[3]), NAN, dtype=x.dtype, device=x.device) for x in (k, v)]
    for row in range(batch):
        places = torch.randperm(total, generator=draw)[: int(kept[row].sum())].sort().values
        mask[row, places] = True
        for to, x in zip(spread, (k, v), strict=True):
            to[row, :, places] = x[row, :, kept[row]]
    return spread[0], spread[1], mask.to(k.device)


def _poison(cache: RingCache, tokens: int) -> None:
    """Make NaN of the slots that none of the newest `tokens` sees."""
    newest = cache.length[:, None] - 1
    age = (newest - torch.arange(cache.slots, device=newest.device)) % cache.slots
    unseen = (age > newest) | (age >= cache.window + tokens - 1)
    for ring in (cache.keys, cache.values):
        ring.masked_fill_(unseen[:, None, :, None], NAN)
