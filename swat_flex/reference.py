"""`naive_swat`: the specification. Dense, obvious, on any device; every backend is tested against it.

It is also the backend `naive`, which `flex_swat(backend="naive")` runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swat_flex import validation
from swat_flex.operands import Operands
from swat_flex.problem import NO_HARDWARE_TANH, Activation, Problem, Slopes, WindowLike


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
    operands = validation.resolve(q, k, v, window, slopes, scale, logit_bias, document_ids, activation, backend="naive")
    if reason := supports(operands.problem()):
        raise NotImplementedError(reason)
    return swat(operands)


def supports(problem: Problem) -> str | None:
    """Say why `naive` cannot run this problem, or return None."""
    return NO_HARDWARE_TANH if problem.activation == "tanh-sigmoid" else None


def tunables(problem: Problem) -> tuple[()]:
    """Name nothing: there is nothing to tune."""
    return ()


def swat(operands: Operands) -> Tensor:
    """Compute the definition: `[B, Hq, Lq, Dv]` in v's dtype."""
    q, v = operands.q, operands.v
    w = weights(logits(operands), visible(operands), operands.activation)
    return w.to(v.dtype) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def logits(operands: Operands) -> Tensor:
    """Compute x_ij for every query and key, hidden or not: `[B, Hq, Lq, Lk]`."""
    q, k = operands.q, operands.k
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    x = q @ keys.transpose(-1, -2) * operands.scale
    if operands.slopes is not None:
        x = x + operands.slopes[:, None, None] * distance(q, k).abs()
    return x if operands.logit_bias is None else x + operands.logit_bias[:, None, None]


def distance(q: Tensor, k: Tensor) -> Tensor:
    """Return i − j, `[Lq, Lk]` tokens: the last query and the last key share a position."""
    q_len, kv_len = q.shape[2], k.shape[2]
    i = torch.arange(kv_len - q_len, kv_len, device=q.device)
    return i[:, None] - torch.arange(kv_len, device=q.device)


def visible(operands: Operands) -> Tensor:
    """Return which keys a query sees: bool `[B, 1, Lq, Lk]`."""
    q, k, ids = operands.q, operands.k, operands.document_ids
    batch, q_len, kv_len = q.shape[0], q.shape[2], k.shape[2]
    seen = operands.window.sees(distance(q, k)).expand(batch, 1, q_len, kv_len)
    if ids is None:
        return seen
    ids = ids.expand(batch, kv_len)
    q_ids, k_ids = ids[:, None, kv_len - q_len :, None], ids[:, None, None, :]
    return seen & (q_ids == k_ids) & (q_ids >= 0)


def weights(x: Tensor, seen: Tensor, activation: str) -> Tensor:
    """Compute σ(x), or softmax(x) over the visible keys; 0 where hidden, and in a row that sees nothing."""
    if activation == "sigmoid":
        return torch.where(seen, x.sigmoid(), 0)
    # A row of −∞ alone must not reach the softmax: its gradient is NaN.
    x = torch.where(seen, x, float("-inf"))
    x = torch.where(seen.any(-1, keepdim=True), x, 0)
    return torch.where(seen, x.softmax(-1), 0)
