"""`python -m perf.emulated`: small cases on the GPU and in the emulation of its machine code, held against each other.

Each case runs twice with the same configurations: on the GPU, and with the same kernels compiled for it executed on the
CPU. With q = 0 every weight is ½ and all that follows is exact, so that the bits must agree; elsewhere the approximate
exponentials of the GPU and the order of its tensor cores' sums may differ by what rounding the results costs.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor

from perf.gpu_steps import place, tell
from swat_flex import flex_swat, tuned
from swat_flex.backends.triton import configuration
from swat_flex.inspection import EXECUTABLE, emulated
from swat_flex.problem import Problem, WindowLike
from swat_flex.testing.budget import with_gradients


@dataclasses.dataclass(frozen=True)
class Small:
    """A call of two query heads and a key head on `length` tokens; `exact` where q = 0 and the rest are integers."""

    length: int
    window: WindowLike
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    exact: bool = False

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output."""
        draw = torch.Generator().manual_seed(self.length)

        def made(heads: int) -> Tensor:
            x = torch.randn(1, heads, self.length, self.head_dim, generator=draw)
            return (x.round() if self.exact else x).to(self.dtype)

        q, k, v, grad = (made(heads) for heads in (2, 1, 1, 2))
        return q * (not self.exact), k, v, grad

    def run(self, device: torch.device, target: str) -> dict[str, Tensor]:
        """The output and the gradients of q, k and v, on the CPU, in the target's default configurations."""
        q, k, v, grad = (x.to(device) for x in self.inputs())
        problem = Problem.of_self_attention(2, self.length, self.head_dim, self.dtype, "cuda", self.window)
        chosen = configuration(problem, target)
        slopes: Any = None if self.exact else "balanced"
        with tuned.using({f"triton.{kernel}": config for kernel, config in chosen.items()}):
            found = with_gradients(flex_swat, (q, k, v), self.window, grad, backend="triton", slopes=slopes)
        return {name: x.cpu() for name, x in found.items()}


CASES = (
    Small(200, 150, exact=True), Small(300, 200), Small(300, (120, 40)), Small(200, 150, 128, exact=True),
    Small(200, 150, 128), Small(200, 150, 40), Small(200, 150, dtype=torch.float16), Small(150, 70, 32, torch.float32),
)  # fmt: skip


def main(dry: bool) -> int:
    """Tell a line per case and tensor; the number of those that differ by more than they may.

    Args:
        dry: emulate sm_90 twice.
    """
    device = place(dry)
    target = "sm_90" if dry else "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    if target not in EXECUTABLE:
        tell(missing=f"{target} is none of {', '.join(EXECUTABLE)}, whose code can be emulated")
        return 0
    wrong = 0
    for case in CASES[:1] if dry else CASES:
        with emulated(target):
            wanted = case.run(torch.device("cpu"), target)
            found = case.run(device, target) if dry else None
        found = case.run(device, target) if found is None else found
        for name, x in wanted.items():
            difference = float((found[name].double() - x.double()).norm() / x.double().norm().clamp_min(1e-300))
            allowed = 0.0 if case.exact else _allowed(case.dtype)
            holds = difference <= allowed  # false for NaN
            wrong += not holds
            equal = float((found[name] == x).double().mean())
            tell(case=str(case), tensor=name, equal=equal, difference=difference, allowed=allowed, holds=holds)
    return wrong


def _allowed(dtype: torch.dtype) -> float:
    """Relative difference (2-norm) of two results that are each rounded; in float32 sums round as well."""
    return torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)


if __name__ == "__main__":
    sys.exit(main("--dry-run" in sys.argv[1:]) > 0)
