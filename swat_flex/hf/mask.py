"""`swat_mask`: padding and packing of a transformers model as document ids, O(L) instead of L×L."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import causal_mask_function

MaskFunction = Callable[..., Any]


def swat_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Document ids for `swat_attention`; registered as the mask of "swat_flex".

    Four-dimensional, because transformers hands a mask of four dimensions on as it is.

    Args:
        batch_size, q_length, kv_length: of q and of the keys that the cache returns.
        q_offset, kv_offset: positions of the first of each.
        mask_function: causal, sliding or packed; the window itself reaches `swat_attention` as sliding_window.
        attention_mask: bool `[B, N]` over all tokens since the start, False for padding; missing ones at its end are
            padding.

    Returns:
        int32 `[B, 1, 1, kv_length]`, document ids; `[B, 1, 2, kv_length]` where the keys end before the last slot, as a
        static cache's do, with the number of slots in use in the second row; None where there is nothing to say.

    Raises:
        NotImplementedError: a pattern that a window and documents do not express.
    """
    if use_vmap or "allow_is_bidirectional_skip" in kwargs or not is_expressible(mask_function):
        raise NotImplementedError(
            "attn_implementation: 'swat_flex' expects causal or sliding-window attention with padding or packing, got "
            "another mask pattern"
        )
    if attention_mask is not None:
        device = attention_mask.device
        # Also of a traced length; torch leaves sym_max untyped.
        missing = torch.sym_max(0, kv_offset + kv_length - attention_mask.shape[1])  # type: ignore[no-untyped-call]
        shown = F.pad(attention_mask, (0, missing))
        ids = shown[:, kv_offset : kv_offset + kv_length].to(torch.int32) - 1
    elif q_length == kv_length and not allow_is_causal_skip:
        ids = packed_ids(mask_function, batch_size, q_length, device)
    else:
        ids = None
    used = q_offset + q_length - kv_offset
    if not isinstance(used, Tensor) and used == kv_length:
        return None if ids is None else ids[:, None, None]
    if ids is None:
        ids = torch.zeros(batch_size, kv_length, dtype=torch.int32, device=device)
    if isinstance(used, Tensor):
        used = used.to(ids.device, torch.int32).expand(batch_size, kv_length)
    else:
        used = torch.full_like(ids, used)
    return torch.stack((ids, used), 1)[:, None]


def packed_ids(mask_function: MaskFunction, batch: int, length: int, device: torch.device | str | None) -> Tensor:
    """`[batch, length]` int32: a document starts where a token does not see the one before it.

    transformers finds the documents in position_ids and hands them on inside mask_function alone. With a window of 1
    every token starts one, which is what it sees.
    """
    row, token = torch.arange(batch, device=device)[:, None], torch.arange(1, length, device=device)
    joined = mask_function(row, torch.zeros_like(row), token, token - 1)
    starts = F.pad(joined.logical_not().expand(batch, length - 1), (1, 0))
    return starts.cumsum(1, dtype=torch.int32)


def is_expressible(mask_function: MaskFunction) -> bool:
    """Tell whether a mask is made of causal, sliding-window and packing parts alone.

    A trace cannot look into closures and takes it for granted; a chunked or blockwise model is refused when it first
    runs eagerly.
    """
    if torch.compiler.is_compiling():
        return True
    code = getattr(mask_function, "__code__", None)
    if code in _LEAVES:
        return True
    if code not in _COMBINATIONS:
        return False
    cells = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    parts = [part for cell in cells for part in (cell if isinstance(cell, tuple) else (cell,)) if callable(part)]
    return all(is_expressible(part) for part in parts)


_EMPTY = torch.empty(0)
_LEAVES = {
    causal_mask_function.__code__,
    masking_utils.sliding_window_overlay(1).__code__,
    masking_utils.packed_sequence_mask_function(_EMPTY).__code__,
}
_COMBINATIONS = {
    masking_utils.and_masks(causal_mask_function).__code__,
    masking_utils.remap_positions_for_packed_sequence(causal_mask_function, _EMPTY).__code__,
}


def aligned(
    key: Tensor, value: Tensor, mask: Tensor | None, window: int | None, queries: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and document ids for `flex_swat`, which wants the last key to be the last query's.

    Of a static cache the last window + queries − 1 keys in use are taken, so that unused slots cost nothing.

    Args:
        key, value: `[B, H, slots, D]` from a cache.
        mask: from `swat_mask`.
        window: keys per query; None is all.
        queries: new tokens.
    """
    if mask is None:
        return key, value, None
    slots = mask.shape[-1]
    if key.shape[2] > slots:  # transformers' sliding cache never evicts where the window is 1
        key, value = key[:, :, -slots:], value[:, :, -slots:]
    elif key.shape[2] < slots:
        raise ValueError(f"attention_mask: expected one id per key, {key.shape[2]} of them, got {slots}")
    if mask.shape[2] == 1:
        return key, value, mask[:, 0, 0]
    length = slots if window is None else min(window + queries - 1, slots)
    slot = mask[0, 0, 1, 0] - length + torch.arange(length, device=mask.device)
    index = slot.clamp(min=0)
    ids = torch.where(slot >= 0, mask[:, 0, 0].index_select(1, index), -1)
    return key.index_select(2, index), value.index_select(2, index), ids
