"""The one error rule of the library: how far a backend may be from the exact result.

    exact   `naive_swat` in float64
    rough   `naive_swat` in float32 with what a low-precision matrix product rounds, rounded to the dtype:
            its operands (q, k, v, the weights, the gradient of the logits) and its results
    u       half the dtype's machine epsilon
    band    u·|exact| + the dtype's smallest subnormal: what one rounding of the exact result may cost

    max |actual − exact|  ≤  2·(max |rough − exact| + max band)
    rms(actual − exact)   ≤  1.25·rms(rough − exact) + 0.5·rms(band)

over the whole tensor. Inputs are drawn in the dtype. A case whose exact result overflows the dtype is excluded.

Both errors are random, and over a few elements their ratio is chance: a tensor of fewer than `ENOUGH` elements is drawn
several times and the draws are stacked before they are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swat_flex import reference, validation
from swat_flex.problem import WindowLike

ENOUGH = 256
NAMES = ("out", "dq", "dk", "dv", "dslopes", "dlogit_bias")


@dataclass(frozen=True, slots=True)
class Budget:
    """One tensor held against the rule; `use` is the larger share of the two bounds, at most 1 when it holds."""

    name: str
    dtype: torch.dtype
    window: WindowLike
    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float
    position: tuple[int, ...]
    actual: float
    exact: float
    rough: float

    @property
    def use(self) -> float:
        return max(self.max_error / self.max_allowed, self.rms_error / self.rms_allowed)

    @property
    def holds(self) -> bool:
        return self.use <= 1

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name} ({dtype}, window {self.window}): max error {self.max_error:.3g} of {self.max_allowed:.3g} "
            f"allowed, rms {self.rms_error:.3g} of {self.rms_allowed:.3g}\n"
            f"worst element {list(self.position)}: got {self.actual:.9g}, exact {self.exact:.9g} "
            f"(error {abs(self.actual - self.exact):.3g}), rough {self.rough:.9g} "
            f"(error {abs(self.rough - self.exact):.3g})"
        )


def measure(actual: Tensor, exact: Tensor, rough: Tensor, *, name: str = "out", window: WindowLike = None) -> Budget:
    """Hold `actual` against `exact` (float64) and `rough` (actual's dtype), all of one shape.

    Raises:
        ValueError: shapes or dtypes that do not fit, an empty tensor, or float64, which has no exact reference here.
    """
    if actual.dtype == torch.float64 or exact.dtype != torch.float64:
        raise ValueError(f"{name}: expected float32 or lower against float64, got {actual.dtype}, {exact.dtype}")
    if not actual.shape == exact.shape == rough.shape or actual.numel() == 0:
        shapes = [list(x.shape) for x in (actual, exact, rough)]
        raise ValueError(f"{name}: expected one shape with elements, got {shapes}")
    precision = torch.finfo(actual.dtype)
    band = precision.eps / 2 * exact.abs() + precision.smallest_normal * precision.eps
    error = (actual.double() - exact).abs().nan_to_num(nan=float("inf"))
    rough_error = (rough.double() - exact).abs()
    worst = int(error.argmax())
    return Budget(
        name=name,
        dtype=actual.dtype,
        window=window,
        max_error=float(error.max()),
        max_allowed=float(2 * (rough_error.max() + band.max())),
        rms_error=_rms(error),
        rms_allowed=1.25 * _rms(rough_error) + 0.5 * _rms(band),
        position=tuple(int(n) for n in torch.unravel_index(torch.tensor(worst), actual.shape)),
        actual=float(actual.flatten()[worst]),
        exact=float(exact.flatten()[worst]),
        rough=float(rough.flatten()[worst]),
    )


def assert_within_budget(
    actual: Tensor, *, exact: Tensor, rough: Tensor, name: str = "out", window: WindowLike = None
) -> Budget:
    """`measure`, raising AssertionError with its report when the rule is broken."""
    budget = measure(actual, exact, rough, name=name, window=window)
    if not budget.holds:
        raise AssertionError(str(budget))
    return budget


def overflows(exact: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether an exact result does not fit the dtype, so that its case is excluded."""
    return bool(~(exact.abs() <= torch.finfo(dtype).max).all())


def with_gradients(
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    window: WindowLike,
    grad: Tensor,
    *,
    slopes: Tensor | str | None = None,
    logit_bias: Tensor | float | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Output and the gradient of every differentiable input of a function called as `flex_swat` is, by `NAMES`.

    `grad` is the output's gradient, `[B, Hq, Lq, Dv]`.
    """
    given: dict[str, Any] = dict(zip(NAMES[1:], (*inputs, slopes, logit_bias), strict=True))
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if isinstance(x, Tensor)}
    q, k, v, slopes, logit_bias = (leaves.get(name, x) for name, x in given.items())
    out = function(q, k, v, window, slopes=slopes, logit_bias=logit_bias, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact_results(
    inputs: tuple[Tensor, Tensor, Tensor], window: WindowLike, grad: Tensor, **options: Any
) -> dict[str, Tensor]:
    """`with_gradients` of `naive_swat` on the inputs in float64; every result is float64."""
    q, k, v = (x.double() for x in inputs)
    return with_gradients(reference.naive_swat, (q, k, v), window, grad, **_in_float64(options))


def exact_swat(q: Tensor, k: Tensor, v: Tensor, window: WindowLike, **options: Any) -> Tensor:
    """`naive_swat` of the inputs in float64; arguments as `flex_swat`."""
    return reference.naive_swat(q.double(), k.double(), v.double(), window, **_in_float64(options))


def _in_float64(options: dict[str, Any]) -> dict[str, Any]:
    is_float = {name: isinstance(x, Tensor) and x.is_floating_point() for name, x in options.items()}
    return {name: x.double() if is_float[name] else x for name, x in options.items()}


def rough_swat(q: Tensor, k: Tensor, v: Tensor, window: WindowLike, **options: Any) -> Tensor:
    """`naive_swat` in float32, rounded where a low-precision matrix product rounds; differentiable."""
    dtype = q.dtype
    operands = validation.resolve(q.float(), k.float(), v.float(), window, **options, backend="naive")
    x = reference.logits(operands)
    if x.requires_grad:  # its gradient is an operand of the products that give dq and dk
        x.register_hook(lambda grad: grad.to(dtype).to(grad.dtype))  # type: ignore[no-untyped-call]  # torch's
    w = reference.weights(x, reference.visible(operands), operands.activation)
    w = w + (w.to(dtype).to(w.dtype) - w).detach()  # rounded, exactly; the gradient passes unrounded
    values = operands.v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (w @ values).to(dtype)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
