"""Compiled FlexAttention programs: what a call is compiled for, how many programs that makes, how they are kept."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from swat_flex import modifiers
from swat_flex.backends.flex.blocks import TILE, Blocks, Bounds
from swat_flex.backends.flex.config import FlexConfig

PROGRAMS = 256  # programs kept at a time; the one unused for longest goes first


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    logit_bias: Tensor | None,
    document_ids: Tensor | None,
    bounds: Bounds,
    blocks: Blocks,
    scale: float,
    softmax: bool,
    config: FlexConfig | None,
) -> Tensor:
    """SWAT of padded tensors through FlexAttention; without a config (on a CPU) the last key is the extra key.

    q is `[B, Hq, rows·TILE, D]`, k and v `[B, Hkv, columns·TILE, ·]`, slopes and logit_bias as in `biased_score`,
    document_ids `[B, ·]`. Rows that hold no query come out as anything finite.
    """
    left, right, offset, kv_len = bounds
    band = modifiers.band_mask(left, right, offset)
    documents = None if document_ids is None else modifiers.document_mask(document_ids, offset)

    def visible_keys(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible = band(b, h, q_idx, kv_idx) & (kv_idx < kv_len)
        return visible if documents is None else visible & documents(b, h, q_idx, kv_idx)

    score = modifiers.biased_score if softmax else modifiers.log_sigmoid_score
    score_mod, mask_mod = score(slopes, logit_bias, offset), cast(modifiers.MaskMod, visible_keys)
    if config is None and not softmax:
        score_mod, mask_mod = modifiers.beside_extra_key(score_mod, mask_mod, k.shape[2] - 1)
    tile = TILE if config is None else config.mask_block
    block_mask = BlockMask((q.shape[2], k.shape[2]), *blocks, BLOCK_SIZE=(tile, tile), mask_mod=mask_mod)
    run = functools.partial(flex_attention, q, k, v, score_mod, block_mask, scale, q.shape[1] != k.shape[1])
    if config is None:
        out = run()
        return out if softmax else modifiers.sum_beside_extra_key(out)
    if softmax:
        return run(kernel_options=config.options())
    out, aux = run(kernel_options=config.options(), return_aux=AuxRequest(lse=True))
    return modifiers.sigmoid_sum(out, aux.lse)


def compiled(*key: object) -> Callable[..., Tensor]:
    """`attend` compiled for one key, which must hold all that a compilation depends on.

    torch.compile gives up on a function, or falls back to a dense L × L product, after 8 compilations of one code
    object; so each key has a code object of its own, compiled once, and once more where an operator in a caller's
    compiled graph runs it (torch dispatches differently there).
    """
    state = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return _compiled(key, state)


@functools.lru_cache(maxsize=PROGRAMS)
def _compiled(key: tuple[object, ...], state: tuple[object, ...]) -> Callable[..., Tensor]:
    own = types.FunctionType(attend.__code__.replace(), attend.__globals__, "attend", attend.__defaults__)
    return torch.compile(own, fullgraph=True, dynamic=False)
