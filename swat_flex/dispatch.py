"""Which backend runs a problem, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from swat_flex import reference, tuned
from swat_flex.backends import banded, cpp, flex, triton
from swat_flex.operands import Operands
from swat_flex.problem import Problem
from swat_flex.tuned import Tunable


class BackendModule(Protocol):
    """A backend: what dispatch calls of it."""

    def supports(self, problem: Problem) -> str | None:
        """Say why it cannot run the problem, or return None."""

    def tunables(self, problem: Problem) -> tuple[Tunable[Any], ...]:
        """List what a call of this problem looks up."""

    def swat(self, operands: Operands) -> Tensor:
        """Compute `[B, Hq, Lq, Dv]`."""


BACKENDS: dict[str, BackendModule] = {"triton": triton, "flex": flex, "cpp": cpp, "banded": banded, "naive": reference}


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that runs, and the reason in words."""

    backend: str
    why: str


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """The name of the fastest right backend, where several can run a problem."""

    backend: str

    def is_valid(self) -> bool:
        """Tell whether the name is one to choose from; `naive` is never the fastest."""
        return self.backend in BACKENDS and self.backend != "naive"


BACKEND = Tunable(
    name="backend",
    config_type=BackendConfig,
    choices=lambda problem: {"backend": tuple(name for name in BACKENDS if name != "naive")},
    is_valid=BackendConfig.is_valid,
    default=lambda problem: BackendConfig(_default(problem).backend),
    files=(Path(__file__),),
    joint=True,
)


def choose(problem: Problem, backend: str = "auto") -> Choice:
    """Choose the backend for a problem: the one asked for by name, else the measured one, else the default.

    A traced problem is read for its device, dtype, flags and head dimensions alone, which all lengths share.

    Raises:
        NotImplementedError: a backend asked for by name that cannot run the problem; it is never replaced.
    """
    if backend != "auto":
        reason = BACKENDS[backend].supports(problem)
        if reason is not None:
            raise NotImplementedError(f"backend={backend!r}: {reason}")
        return Choice(backend, "asked for by name")
    preferred = tuned.lookup(BACKEND, problem)
    if preferred is not None and BACKENDS[preferred.backend].supports(problem) is None:
        return Choice(preferred.backend, "the fastest right one measured for such calls on this device")
    return _default(problem)


def _default(problem: Problem) -> Choice:
    """Choose without a measurement."""
    device = problem.device.type
    why = f"the backend made for {device}"
    if device == "cuda":
        if problem.learns_bias and triton.supports(problem) is None:
            return Choice("triton", "gradients of slopes repeat to the bit; flex adds one to memory for every score")
        reason = flex.supports(problem)
        if reason is None:
            return Choice("flex", "FlexAttention's fused kernels; the triton kernels have no GPU record yet")
        why = f"flex: {reason}"
        if triton.supports(problem) is None:
            return Choice("triton", why)
    elif device == "cpu":
        reason = cpp.supports(problem)
        if reason is None:
            return Choice("cpp", "the fused kernels for a CPU")
        why = f"cpp: {reason}"
    reason = banded.supports(problem)
    if reason is not None:
        raise NotImplementedError(f"backend='auto': no backend on {device} fits; banded: {reason}")
    return Choice("banded", why)


def compiler() -> str:
    """Say what built the kernels of `cpp`, for which vectors and in what time; or why there are none, in one line."""
    return cpp.describe()
