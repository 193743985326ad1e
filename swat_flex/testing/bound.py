"""How far rounding may move each single element: what a tensor too small for the budget rule is held against.

The budget rule compares two random errors, which over a few elements is chance. This one follows each rounding through
the definition and adds up absolute values, so it never cancels and is an upper bound for any order of summation:

    δx = ε·(scale·|q||k| + |slope·distance| + |bias|)         ε: half a unit of float32, in which logits are
    δw = u·w + w(1 − w)·δx                                    u: half a unit of the dtype
    δout = δw·|v| + u·|out|,  δdv = δwᵀ·|g| + u·|dv|          g: the output's gradient, dw = g·vᵀ, dx = dw·w(1 − w)
    δdx = u·|dx| + w(1 − w)·(ε·|g||v| + |dw|·δx) + ε·w·|dw|
    δdq = scale·δdx·|k| + u·|dq|, …

each with room for the smallest number. `SLACK` times that is allowed: several roundings happen where one is counted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swat_flex import reference, validation
from swat_flex.problem import WindowLike

SLACK = 8.0


def rounding_bound(
    inputs: tuple[Tensor, Tensor, Tensor],
    window: WindowLike,
    grad: Tensor,
    exact: dict[str, Tensor],
    *,
    slopes: Any = None,
    scale: float | None = None,
    logit_bias: Tensor | float | None = None,
    document_ids: Tensor | None = None,
    activation: str = "sigmoid",
) -> dict[str, Tensor]:
    """Largest error of each element that rounding explains, float64, for each of `exact_results`' names in `exact`."""
    dtype = inputs[0].dtype
    u, least = torch.finfo(dtype).eps / 2, _least(dtype)
    epsilon = torch.finfo(torch.float32).eps / 2
    if dtype == torch.float64:  # in which the exact result itself is computed
        u = epsilon = torch.finfo(dtype).eps
    q, k, v, g = (x.double() for x in (*inputs, grad))
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    slopes, logit_bias = (x.double() if isinstance(x, Tensor) else x for x in (slopes, logit_bias))
    exactly = validation.resolve(q, k, v, window, slopes, scale, logit_bias, document_ids, activation, "naive")
    scale = exactly.scale

    bias = reference.logits(replace(exactly, q=q * 0, slopes=None)).abs()
    bias += reference.logits(replace(exactly, q=q * 0, logit_bias=None)).abs()
    dx_logit = epsilon * (abs(scale) * (q.abs() @ keys.abs().mT) + bias)
    seen = reference.visible(exactly)
    w = reference.weights(reference.logits(exactly), seen, activation)
    dw, dw_size = g @ values.mT, epsilon * (g.abs() @ values.abs().mT)
    floor = least * seen
    if activation == "softmax":
        worst = dx_logit.masked_fill(~seen, 0).amax(-1, keepdim=True)
        dw = dw - (dw * w).sum(-1, keepdim=True)
        e_w = (u + epsilon + 2 * worst) * w + floor
        e_dx = w * (dw_size + (dw_size * w).sum(-1, keepdim=True)) * (1 + 4 * worst / epsilon) + u * (w * dw).abs()
        e_dx = e_dx + floor
    else:
        slope = w * (1 - w)
        e_w = u * w + slope * dx_logit + floor
        e_dx = u * (dw * slope).abs() + slope * (dw_size + dw.abs() * dx_logit) + epsilon * w * dw.abs() + floor

    def of_keys(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2)

    bounds = {
        "out": e_w @ values.abs(),
        "dq": abs(scale) * (e_dx @ keys.abs()),
        "dk": abs(scale) * of_keys(e_dx.mT @ q.abs()),
        "dv": of_keys(e_w.mT @ g.abs()),
        "dslopes": (e_dx * reference.distance(q, k).abs()).sum((0, 2, 3)),
        "dlogit_bias": e_dx.sum((0, 2, 3)),
    }
    return {name: SLACK * (bounds[name] + u * x.abs() + least) for name, x in exact.items()}


def _least(dtype: torch.dtype) -> float:
    """Return what underflow may cost: float16's smallest number, else float32's or float64's smallest normal one."""
    precision = torch.finfo(dtype)
    return precision.smallest_normal * (precision.eps if dtype == torch.float16 else 1)
