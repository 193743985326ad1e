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
    x = logits(q, k, slopes, scale, logit_bias)
    w = weights(x, visible(q, k, window, document_ids), activation)
    return w.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def logits(q: Tensor, k: Tensor, slopes: Slopes, scale: float | None, logit_bias: Tensor | float | None) -> Tensor:
    """x_ij of every query and key, hidden or not: `[B, Hq, Lq, Lk]`."""
    heads, head_dim = q.shape[1], q.shape[3]
    keys = k.repeat_interleave(heads // k.shape[1], 1)
    x = q @ keys.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    slope = slopes_of(slopes, heads, q)
    if slope is not None:
        x = x + slope[:, None, None] * distance(q, k).abs()
    if isinstance(logit_bias, Tensor):
        return x + logit_bias[:, None, None]
    return x if logit_bias is None else x + logit_bias


def distance(q: Tensor, k: Tensor) -> Tensor:
    """i − j, `[Lq, Lk]` tokens: the last query and the last key share a position."""
    q_len, kv_len = q.shape[2], k.shape[2]
    i = torch.arange(kv_len - q_len, kv_len, device=q.device)
    return i[:, None] - torch.arange(kv_len, device=q.device)


def visible(q: Tensor, k: Tensor, window: Window, document_ids: Tensor | None) -> Tensor:
    """Which keys a query sees: bool `[B, 1, Lq, Lk]`."""
    batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2]
    seen = window.sees(distance(q, k)).expand(batch, 1, q_len, kv_len)
    if document_ids is None:
        return seen
    ids = document_ids.expand(batch, kv_len)
    q_ids, k_ids = ids[:, None, kv_len - q_len :, None], ids[:, None, None, :]
    return seen & (q_ids == k_ids) & (q_ids >= 0)


def weights(x: Tensor, seen: Tensor, activation: str) -> Tensor:
    """σ(x), or softmax(x) over the visible keys; 0 where hidden, and in a row that sees nothing."""
    if activation == "sigmoid":
        return torch.where(seen, x.sigmoid(), 0)
    # A row of −∞ alone must not reach the softmax: its gradient is NaN.
    x = torch.where(seen, x, float("-inf"))
    x = torch.where(seen.any(-1, keepdim=True), x, 0)
    return torch.where(seen, x.softmax(-1), 0)
