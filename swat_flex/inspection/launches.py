"""Launches of Triton kernels carried out by `execute` instead of a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from swat_flex.backends import triton
from swat_flex.backends.triton import decode_op, op
from swat_flex.inspection.execute import EXECUTABLE, Execution, compile_launch, execute


@dataclass(frozen=True, slots=True)
class Launched:
    """A launch that was carried out: the compiled kernel, its grid and arguments by name, and what the run showed."""

    kernel: Any
    grid: Sequence[int]
    arguments: Mapping[str, Any]
    execution: Execution

    @property
    def name(self) -> str:
        return str(self.kernel.metadata.name)


@contextmanager
def launches_executed(target: str) -> Iterator[list[Launched]]:
    """Run every `kernel[grid](…)` with `execute`, on tensors of the CPU; give the list of what was launched.

    A kernel that needs more shared memory than the target has raises Triton's OutOfResources, as a launch would. The
    target is as in `execute`.
    """
    from triton import JITFunction
    from triton.runtime.errors import OutOfResources

    launch, ran = JITFunction.run, list[Launched]()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        if warmup:
            return launch(self, *args, grid=grid, warmup=warmup, **more)
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments |= {name: more.pop(name) for name in self.arg_names if name in more}
        kernel = compile_launch(self, target, arguments, **more)
        if kernel.metadata.shared > EXECUTABLE[target]:
            raise OutOfResources(kernel.metadata.shared, EXECUTABLE[target], "shared memory")
        grid = grid(arguments) if callable(grid) else grid
        ran.append(Launched(kernel, grid, arguments, execute(kernel, target, grid, arguments)))
        return kernel

    with mock.patch.object(JITFunction, "run", run):
        yield ran


@contextmanager
def emulated(target: str) -> Iterator[list[Launched]]:
    """`launches_executed` for backend `triton`, which takes the CPU's tensors as if they lay on that target.

    Raises:
        ValueError: a target that cannot be executed.
    """
    if target not in EXECUTABLE:
        raise ValueError(f"target: expected one of {', '.join(EXECUTABLE)}, got {target!r}")
    supports = triton.supports
    with (
        mock.patch.object(op, "target_of", return_value=target),
        mock.patch.object(decode_op, "target_of", return_value=target),
        mock.patch.object(
            triton, "supports", lambda problem: supports(dataclasses.replace(problem, device=torch.device("cuda")))
        ),
        launches_executed(target) as ran,
    ):
        yield ran
