"""Is `flex_swat` right on these inputs? Asked before any of its times counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swat_flex.api import flex_swat
from swat_flex.cli.text import Inputs
from swat_flex.problem import WindowLike
from swat_flex.testing.budget import exact_results, with_gradients


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
    q, k, v = inputs.q, inputs.k, inputs.v
    actual = with_gradients(flex_swat, (q, k, v), window, inputs.grad, slopes="balanced")
    exact = exact_results((q.cpu(), k.cpu(), v.cpu()), window, inputs.grad.cpu(), slopes="balanced")
    output, *gradients = (
        float((actual[name].cpu().double() - x).abs().max() / x.abs().max()) for name, x in exact.items()
    )
    sums = torch.float64 if q.dtype == torch.float64 else torch.float32
    return Errors(output, max(gradients), 4 * torch.finfo(q.dtype).eps + 64 * torch.finfo(sums).eps)
