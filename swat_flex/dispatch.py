"""Which backend runs a problem, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from swat_flex.backends import banded, flex, triton
from swat_flex.problem import SwatProblem
from swat_flex.window import Window


class BackendModule(Protocol):
    """What every package under `backends` offers."""

    def supports(self, problem: SwatProblem) -> str | None: ...

    def configuration(self, problem: SwatProblem) -> object: ...

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


def choose(problem: SwatProblem, backend: str = "auto") -> Choice:
    """The backend for a problem; one asked for by name runs or raises NotImplementedError, it is never replaced.

    Reads only what is the same for every length: device, dtype, flags and head dimension.
    """
    if backend != "auto":
        reason = why_not(problem, backend)
        if reason is not None:
            raise NotImplementedError(f"backend={backend!r}: {reason}")
        return Choice(backend, "asked for by name")
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
