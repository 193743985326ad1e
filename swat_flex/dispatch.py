"""Which backend runs a problem, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from swat_flex import winners
from swat_flex.backends import banded, flex, triton
from swat_flex.problem import SwatProblem
from swat_flex.window import Window
from swat_flex.winners import Call, Tunable


class BackendModule(Protocol):
    """What every package under `backends` offers."""

    def supports(self, problem: SwatProblem) -> str | None: ...

    def configuration(self, problem: SwatProblem) -> object: ...

    def tunables(self, problem: SwatProblem) -> tuple[Tunable[Any], ...]: ...

    def swat(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor | None,
        logit_bias: Tensor | None,
        document_ids: Tensor | None,
        window: Window,
        scale: float,
        activation: str,
    ) -> Tensor: ...


BACKENDS: dict[str, BackendModule] = {"triton": triton, "flex": flex, "banded": banded}


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that runs, and the reason in words."""

    backend: str
    why: str


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """Which backend is the fastest right one, where several can run a problem."""

    backend: str

    def is_valid(self) -> bool:
        return self.backend in BACKENDS


BACKEND = Tunable(
    name="backend",
    config_type=BackendConfig,
    choices=lambda problem: {"backend": tuple(BACKENDS)},
    is_valid=BackendConfig.is_valid,
    default=lambda problem: BackendConfig(choose(problem).backend),
    files=(Path(__file__),),
    joint=True,
)


def choose(problem: SwatProblem, backend: str = "auto", call: Call | None = None) -> Choice:
    """The backend for a problem; one asked for by name runs or raises NotImplementedError, it is never replaced.

    Args:
        problem: read for what is the same for every length: device, dtype, flags and head dimension.
        backend: "auto" or a name.
        call: of plain tensors, whose bucket may have a measured preference; None while tracing.
    """
    if backend != "auto":
        reason = why_not(problem, backend)
        if reason is not None:
            raise NotImplementedError(f"backend={backend!r}: {reason}")
        return Choice(backend, "asked for by name")
    if call is not None:
        preferred = winners.lookup(BACKEND, call)
        if preferred is not None and why_not(problem, preferred.backend) is None:
            return Choice(preferred.backend, "the fastest right one measured for such calls on this device")
    if problem.device_type == "cuda":
        reason = why_not(problem, "flex")
        if reason is None:
            return Choice("flex", "FlexAttention's fused kernels; the triton kernels have no GPU record yet")
        why = f"flex: {reason}"
    else:
        why = f"the backend made for {problem.device_type}"
    reason = why_not(problem, "banded")
    if reason is not None:
        raise NotImplementedError(f"backend='auto': no backend on {problem.device_type} fits; banded: {reason}")
    return Choice("banded", why)


def why_not(problem: SwatProblem, backend: str) -> str | None:
    """Why this backend cannot run the problem, or None."""
    return BACKENDS.get(backend, banded).supports(problem)  # `naive` supports what `banded` does
