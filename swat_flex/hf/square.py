"""`square_documents`: the documents and the window that a four-dimensional mask shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN = -1e4  # an additive mask hides with this or less; σ of it is 0
EXPECTED = (
    "attention_mask: expected [B, N] of 0 and 1, or [B, 1, Q, K] of bool or of 0 and at most -1e4 that shows each "
    "query the keys of its own document up to its own, all of them or a window"
)


def is_square(mask: Tensor | None) -> bool:
    """Tell a user's four-dimensional mask from the ids of `swat_mask`, which are int32."""
    return mask is not None and mask.dim() == 4 and mask.dtype != torch.int32


def square_documents(mask: Tensor, batch: int, queries: int, keys: int) -> tuple[Tensor, int | None]:
    """Find the document ids and the window that a mask of queries × keys shows.

    The last key is the last query's own. A token that does not see itself is padding, whatever its row says. Everything
    is found on the mask's device; one read there tells whether the mask is nothing else.

    >>> square_documents(torch.ones(3, 3).tril().bool()[None, None], 1, 3, 3)
    (tensor([[0, 0, 0]], dtype=torch.int32), None)

    Args:
        mask: `[batch or 1, 1, queries, keys]`, bool with True for visible, or floating with 0 for visible and at most
            `HIDDEN` else.

    Returns:
        Document ids int32 `[batch, keys]`, −1 for padding and for earlier keys that no query sees, and the window,
        keys per query, its own included; None where each query sees its whole document so far.

    Raises:
        ValueError: another shape or dtype.
        NotImplementedError: another pattern; any, in a traced program, which cannot check it.
    """
    if tuple(mask.shape[1:]) != (1, queries, keys) or mask.shape[0] not in (1, batch):
        sizes = f"{batch} rows, {queries} queries and {keys} keys"
        raise ValueError(f"{EXPECTED}, got shape {list(mask.shape)} for {sizes}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{EXPECTED}, got {mask.dtype}")
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"{EXPECTED}, got a four-dimensional one in a traced program, which cannot check it")
    shown = (mask if mask.dtype == torch.bool else mask == 0)[:, 0]  # [B or 1, Q, K]
    plain = torch.ones((), dtype=torch.bool) if mask.dtype == torch.bool else ((mask == 0) | (mask <= HIDDEN)).all()
    ids = _ids(shown)
    own = ids[:, keys - queries :, None]
    shown = shown & (own >= 0)
    distance = torch.arange(keys - queries, keys, device=mask.device)[:, None] - torch.arange(keys, device=mask.device)
    whole = (own == ids[:, None]) & (own >= 0) & (distance >= 0)
    window = torch.where(shown, distance, 0).amax() + 1
    is_whole = (shown == whole).all()
    is_window = (shown == whole & (distance < window)).all()
    read = torch.stack([value.to(mask.device, torch.int64) for value in (plain, is_whole, is_window, window)]).tolist()
    if not read[0] or not read[2]:
        raise NotImplementedError(f"{EXPECTED}, got " + ("another pattern" if read[0] else "values between"))
    return ids.expand(batch, -1), None if read[1] else read[3]


def _ids(shown: Tensor) -> Tensor:
    """`[B, K]` int32: a token is of the document of the last token before it that is no padding, if it sees that."""
    _, queries, keys = shown.shape
    past = keys - queries
    kept = shown.diagonal(past, 1, 2)  # [B, Q]: a query that sees itself is no padding
    last = torch.where(kept, torch.arange(queries, device=shown.device), -1).cummax(1).values
    before = F.pad(last[:, :-1], (1, 0), value=-1)
    joined = shown.gather(2, (before.clamp(min=0) + past)[:, :, None])[:, :, 0] & (before >= 0)
    ids = torch.where(kept, (kept & ~joined).cumsum(1) - 1, -1)
    first = kept.to(torch.int8).argmax(1)[:, None, None].expand(-1, 1, past)
    earlier = shown[:, :, :past].gather(1, first)[:, 0]  # what the first document's first query sees of the cache
    return torch.cat((earlier.to(ids.dtype) - 1, ids), 1).to(torch.int32)
