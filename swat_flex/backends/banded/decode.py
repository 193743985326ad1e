"""Decoding in plain PyTorch operators: new queries against a ring of keys.

On a CPU the lengths are known, so that only the slots a query sees are touched: at most two runs of the ring, in place.
Elsewhere reading them would wait for the device, so the whole ring is computed and hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from swat_flex.backends.banded.op import exact_products
from swat_flex.backends.operator import define_decode, empty_output
from swat_flex.positions import per_head_dtype

CHUNK = 2**22  # elements of keys and values converted to float32 at a time


def _decode(q: Tensor, *rest: Any) -> Tensor:
    with exact_products(q.device.type):
        return (_live_slots if q.device.type == "cpu" else all_slots)(q, *rest)


def _live_slots(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, slopes: Tensor | None, logit_bias: Tensor | None,
    window: int, scale: float,
) -> Tensor:  # fmt: skip
    """Rows of the batch that follow one another with one length go together."""
    out, dtype = empty_output(q, values.shape[3]), per_head_dtype(q)
    kv_heads, tokens = keys.shape[1], q.shape[2]
    row = 0
    for count, same in groupby(length.tolist()):
        rows = slice(row, row + len(list(same)))
        row = rows.stop
        # [G, group·T, D], G rows of the batch × key heads: the query heads of a key head one below the other
        queries = q[rows].to(dtype).reshape(-1, q.shape[1] // kv_heads * tokens, q.shape[3])
        chunk = max(CHUNK // (len(queries) * (keys.shape[3] + values.shape[3])), 64)
        total = torch.zeros(*queries.shape[:2], values.shape[3], dtype=dtype)
        newest = torch.arange(count - tokens, count)[:, None]  # positions of the queries, [T, 1]
        for first, slots in _runs(count, min(count, window + tokens - 1), keys.shape[2], chunk):
            k, v = (x[rows, :, slots].flatten(0, 1).to(dtype) for x in (keys, values))
            distance = newest - torch.arange(first, first + k.shape[1])
            x = torch.bmm(k, queries.transpose(1, 2)).transpose(1, 2).contiguous()  # half the time of q kᵀ
            by_head = x.view(-1, q.shape[1], *distance.shape)
            by_head.mul_(scale)
            if slopes is not None:
                by_head.add_(slopes.to(dtype)[:, None, None] * distance)
            if logit_bias is not None:
                by_head.add_(logit_bias.to(dtype)[:, None, None])
            x.sigmoid_()
            if tokens > 1:  # a single query sees every live slot
                by_head.masked_fill_((distance < 0) | (distance >= window), 0)
            total.baddbmm_(x, v)
        out[rows].copy_(total.view(-1, *out.shape[1:]))
    return out


def _runs(count: int, live: int, slots: int, chunk: int) -> Iterator[tuple[int, slice]]:
    """(position of its first key, slots) of each run, at most `chunk` long, of the last `live` of `count` positions."""
    position = count - live
    while position < count:
        slot = position % slots
        stop = min(slot + min(count - position, chunk), slots)
        yield position, slice(slot, stop)
        position += stop - slot


def all_slots(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, slopes: Tensor | None, logit_bias: Tensor | None,
    window: int, scale: float,
) -> Tensor:  # fmt: skip
    """Every slot of the ring, hidden where no query sees it, whatever it holds."""
    dtype = per_head_dtype(q)
    batch, kv_heads, slots, _ = keys.shape
    tokens = q.shape[2]
    newest = (length - 1)[:, None]
    # [B, S]: the last position with this slot, from the newest
    age = (newest - torch.arange(slots, device=q.device)) % slots
    distance = age[:, None] - torch.arange(tokens - 1, -1, -1, device=q.device)[:, None]  # [B, T, S]
    seen = (distance >= 0) & (distance < window) & (age <= newest)[:, None]
    queries = q.to(dtype).reshape(batch, kv_heads, -1, q.shape[3])
    x = (queries @ keys.to(dtype).transpose(2, 3)).view(batch, q.shape[1], tokens, slots) * scale
    if slopes is not None:
        x = x + slopes.to(dtype)[:, None, None] * distance[:, None]
    if logit_bias is not None:
        x = x + logit_bias.to(dtype)[:, None, None]
    weights = torch.where(seen[:, None], x.sigmoid(), 0).view(batch, kv_heads, -1, slots)
    live = seen.any(1)[:, None, :, None]
    out = empty_output(q, values.shape[3])
    return out.copy_((weights @ torch.where(live, values, 0).to(dtype)).view(out.shape))


decode = define_decode("banded", _decode)
