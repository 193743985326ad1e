"""What a search runs: one tunable on one problem, in this process or in a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from autotune import Clock, Rejected, clock_for
from swat_flex import dispatch, tuned
from swat_flex.api import flex_swat
from swat_flex.backends import triton
from swat_flex.problem import Problem
from swat_flex.testing.sampled import SampledReference
from swat_flex.tuned import Tunable
from swat_flex.tuning.inputs import Inputs

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """One search to run.

    Attributes:
        backend: whose the tunable is; "auto" for the choice between backends.
        problem: whose device is where it runs.
        document_ids: as `Inputs`; on the CPU.
        settings: configurations of other tunables while this one is measured, by name.
    """

    tunable: str
    backend: str
    problem: Problem
    document_ids: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def find(self) -> Tunable[Any]:
        for tunable in (dispatch.BACKEND, triton.DECODE):
            if self.tunable == tunable.name:
                return tunable
        of_backend = dispatch.BACKENDS[self.backend].tunables(self.problem)
        return next(tunable for tunable in of_backend if tunable.name == self.tunable)


class SwatTask:
    """Runs, checks and times a job's candidates: what autotune calls a Task."""

    clock: Clock

    def __init__(self, job: Job) -> None:
        self._job, self._problem, self._tunable = job, job.problem, job.find()
        self._inputs = Inputs(job.problem, job.document_ids)
        self._pass = _PASSES.get(job.tunable, _call)
        self.clock = clock_for(job.problem.device)

    def compile(self, config: Any) -> None:
        """Read the machine code of our own kernels; FlexAttention's is compiled where it first runs."""
        if self._problem.device.type != "cuda":
            return
        if self._job.backend != "triton":
            self._run(config, self._inputs.grad)
        elif config != self._tunable.default(self._problem):  # which runs in any case: all others are compared with it
            from swat_flex.tuning.facts import complaint, of_device

            kernel = self._job.tunable.partition(".")[2]
            if reason := complaint(kernel, self._problem, config, *of_device(self._problem.device)):
                raise Rejected(reason)

    def prepare(self, config: Any) -> Callable[[], tuple[Any, Results]]:
        """Return a function that gives the configuration too: a check runs it once more."""
        grad = self._inputs.grad
        return lambda: (config, self._run(config, grad))

    def check(self, output: Any) -> str | None:
        config, results = output
        sampled = self._run(config, self._reference.sampled_gradient()) if "dk" in results else {}
        return self._reference.complaint(results, sampled)

    @cached_property
    def _reference(self) -> SampledReference:
        return SampledReference(self._inputs.operands, self._inputs.grad)

    def _run(self, config: Any, grad: Tensor) -> Results:
        forced = {**self._job.settings, self._job.tunable: config}
        backend = config.backend if self._job.tunable == dispatch.BACKEND.name else self._job.backend
        with tuned.using(forced):
            return self._pass(backend, self._inputs, grad)


def _call(backend: str, inputs: Inputs, grad: Tensor) -> Results:
    """Call `flex_swat` as a user does: forward, and backward where the problem has one."""
    if not inputs.problem.needs_grad:
        return _forward(backend, inputs, grad)
    leaves, options = [x.detach().requires_grad_() for x in inputs.qkv], dict(inputs.options)
    learnt = []
    if inputs.problem.learns_bias:
        for name in ("slopes", "logit_bias"):
            if options[name] is not None:
                options[name] = options[name].detach().requires_grad_()
                learnt.append(options[name])
    out = flex_swat(*leaves, inputs.window, backend=backend, **options)  # type: ignore[call-arg, arg-type]  # three leaves, a name
    gradients = torch.autograd.grad(out, [*leaves, *learnt], grad)[:3]
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def _forward(backend: str, inputs: Inputs, grad: Tensor) -> Results:
    with torch.no_grad():
        return {"out": flex_swat(*inputs.qkv, inputs.window, backend=backend, **inputs.options)}  # type: ignore[arg-type]  # a name


def _backward(backend: str, inputs: Inputs, grad: Tensor) -> Results:
    """Run the backward alone, through its operator."""
    options, activation = inputs.options, inputs.problem.activation
    operator = getattr(torch.ops.swat_flex, f"{backend}_backward")
    vectors = (options["slopes"], options["logit_bias"], options["document_ids"])
    with torch.no_grad():
        *gradients, _ = operator(grad, *inputs.qkv, *vectors, *inputs.window, inputs.scale, activation, False)
    return dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def _decode(backend: str, inputs: Inputs, grad: Tensor) -> Results:
    """Run a step of the decode kernel, through its operator."""
    q, options, problem = inputs.qkv[0], inputs.options, inputs.problem
    window = problem.kv_len - problem.q_len + 1
    out = triton.swat_decode(q, *inputs.ring, options["slopes"], options["logit_bias"], window, inputs.scale)
    return {"out": out}


# What is timed for a tunable; the others' configurations serve the whole call.
_PASSES: dict[str, Callable[[str, Inputs, Tensor], Results]] = {
    "banded.forward": _forward,
    "banded.backward": _backward,
    "triton.forward": _forward,
    "triton.query_gradient": _backward,
    "triton.key_gradients": _backward,
    "triton.decode": _decode,
}
