"""`naive_swat`: the specification. Dense, obvious, on any device; every backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from swat_flex import validation
from swat_flex.positions import slopes_of
from swat_flex.problem import Activation, Slopes, WindowLike
from swat_flex.window import Window


def naive_swat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: WindowLike,
    *,
    slopes: Slopes = "balanced",
    scale: float | None = None,
    logit_bias: Tensor | float | None = None,
    document_ids: Tensor | None = None,
    activation: Activation = "sigmoid",
) -> Tensor:
    """o_i = Σ σ(scale·⟨q_i, k_j⟩ + slopes·|i − j| + logit_bias) v_j over the visible j, written down as it reads.

    Arguments, shapes and errors are those of `flex_swat`. Computes in its inputs' dtype (logits in the slopes' where
    that is wider): give it float64 for an exact result. Needs O(B·Hq·Lq·Lk) memory.
    """
    validation.check_kinds(q, k, v)
    validation.check(q, k, v, window, slopes, scale, logit_bias, document_ids, activation, "naive")
    return attend(q, k, v, Window.of(window), slopes, scale, logit_bias, document_ids, activation)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    slopes: Slopes,
    scale: float | None,
    logit_bias: Tensor | float | None,
    document_ids: Tensor | None,
    activation: str,
) -> Tensor:
    """`naive_swat` behind its door."""
    if activation == "tanh-sigmoid":
        raise NotImplementedError(
            "activation='tanh-sigmoid': a GPU's hardware tanh, which only the triton backend uses"
        )
    heads, q_len, head_dim = q.shape[1:]
    group, kv_len = heads // k.shape[1], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    i = torch.arange(kv_len - q_len, kv_len, device=q.device)[:, None]
    j = torch.arange(kv_len, device=q.device)
    visible = window.sees(i - j).expand(q.shape[0], 1, q_len, kv_len)
    if document_ids is not None:
        ids = document_ids.expand(q.shape[0], kv_len)
        q_ids, k_ids = ids[:, None, kv_len - q_len :, None], ids[:, None, None, :]
        visible = visible & (q_ids == k_ids) & (q_ids >= 0)

    logits = q @ k.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    slope = slopes_of(slopes, heads, q)
    if slope is not None:
        logits = logits + slope[:, None, None] * (i - j).abs()
    if isinstance(logit_bias, Tensor):
        logits = logits + logit_bias[:, None, None]
    elif logit_bias is not None:
        logits = logits + logit_bias

    if activation == "sigmoid":
        weights = torch.where(visible, logits.sigmoid(), 0)
    else:  # rows that see nothing must not reach the softmax as a row of −∞: its gradient is NaN
        something = visible.any(-1, keepdim=True)
        logits = torch.where(visible, logits, float("-inf"))
        weights = torch.where(visible, torch.where(something, logits, 0).softmax(-1), 0)
    return weights.to(v.dtype) @ v
