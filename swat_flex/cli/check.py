"""Is `flex_swat` right on these inputs? Asked before any of its times counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swat_flex.api import flex_swat
from swat_flex.cli.text import Inputs
from swat_flex.problem import WindowLike
from swat_flex.reference import naive_swat


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest errors against the definition in float64, each relative to the largest exact entry.

    Attributes:
        output: of the output.
        gradients: the largest of q's, k's and v's.
        allowed: what rounding explains.
    """

    output: float
    gradients: float
    allowed: float

    @property
    def right(self) -> bool:
        """Tell whether both are allowed; a NaN is not."""
        return self.output <= self.allowed and self.gradients <= self.allowed


def compare(inputs: Inputs, window: WindowLike) -> Errors:
    """Output and gradients of `flex_swat` against `naive_swat` in float64, on the CPU: not every device has float64.

    Allowed are four roundings to the inputs' dtype, and 64 of float32, in which sums are kept (float64 for float64).
    """
    leaves = (inputs.q, inputs.k, inputs.v)
    output = flex_swat(*leaves, window)
    actual = (output, *torch.autograd.grad(output, leaves, inputs.grad))

    q, k, v = (x.detach().cpu().double().requires_grad_() for x in leaves)
    exact_output = naive_swat(q, k, v, window)
    exact = (exact_output, *torch.autograd.grad(exact_output, (q, k, v), inputs.grad.cpu().double()))

    errors = [_relative(a, e) for a, e in zip(actual, exact, strict=True)]
    dtype = inputs.q.dtype
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = 4 * torch.finfo(dtype).eps + 64 * torch.finfo(sums).eps
    return Errors(errors[0], max(errors[1:]), allowed)


def _relative(actual: Tensor, exact: Tensor) -> float:
    error = (actual.detach().cpu().double() - exact.detach()).abs().max()
    return float(error / exact.detach().abs().max())
