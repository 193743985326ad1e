"""`python -m perf.emulated`: small cases on the GPU and in the emulation of its machine code, held against each other.

Each case runs twice with the same configurations: on the GPU, and with the same kernels compiled for it executed on the
CPU. With q = 0 every weight is ½ and all that follows is exact, so that the bits must agree; elsewhere the approximate
exponentials of the GPU and the order of its tensor cores' sums may differ by what rounding the results costs.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from perf.gpu_steps import place, tell
from swat_flex import tuned
from swat_flex.backends.triton import configuration
from swat_flex.inspection import EXECUTABLE, emulated
from swat_flex.problem import Problem, WindowLike
from swat_flex.testing.case import SwatCase


class Exact(SwatCase):
    """q = 0 and whole numbers elsewhere: every weight is ½."""

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().tensors()
        return q * 0, k.round(), v.round()

    def gradient(self) -> Tensor:
        return super().gradient().round()


def small(
    kind: type[SwatCase], length: int, window: WindowLike, head_dim: int = 64, dtype: str = "bfloat16"
) -> SwatCase:
    """A call of two query heads and a key head."""
    slopes = "none" if kind is Exact else "balanced"
    return kind(length, window, group=2, head_dim=head_dim, value_dim=head_dim, dtype=dtype, slopes=slopes)


CASES = (
    small(Exact, 200, 150), small(SwatCase, 300, 200), small(SwatCase, 300, (120, 40)), small(Exact, 200, 150, 128),
    small(SwatCase, 200, 150, 128), small(SwatCase, 200, 150, 40), small(SwatCase, 200, 150, dtype="float16"),
    small(SwatCase, 150, 70, 32, "float32"),
)  # fmt: skip


def run(case: SwatCase, device: torch.device, target: str) -> dict[str, Tensor]:
    """The output and the gradients of q, k and v, on the CPU, in the target's default configurations."""
    problem = Problem.of_self_attention(2, case.length, case.head_dim, case.torch_dtype, "cuda", case.window)
    chosen = configuration(problem, target)
    with tuned.using({f"triton.{kernel}": config for kernel, config in chosen.items()}):
        return case.call("triton", str(device))


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
            wanted = run(case, torch.device("cpu"), target)
            found = run(case, device, target) if dry else None
        found = run(case, device, target) if found is None else found
        for name, x in wanted.items():
            difference = float((found[name].double() - x.double()).norm() / x.double().norm().clamp_min(1e-300))
            allowed = 0.0 if isinstance(case, Exact) else _allowed(case.torch_dtype)
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
