"""Which searches a problem asks for, and what fits into a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autotune.search import FINAL_ROUNDS, FINALISTS, ROUNDS
from swat_flex import dispatch
from swat_flex.backends import triton
from swat_flex.problem import Problem
from swat_flex.tuning.tasks import Job, SwatTask

CALLS = 5 + ROUNDS  # of one candidate: warm-up, checks, samples
FINAL = FINAL_ROUNDS * (FINALISTS + 1)  # calls of the last comparison, when five meet
LEAST = 2 * (CALLS + FINAL_ROUNDS)  # calls without which there is no comparison
SAMPLE_SECONDS = 0.005  # what a sample lasts at least
GPU_COMPILE_SECONDS = 3.0  # a guess for one candidate of many that compile side by side
CPU_FLOPS = 2e10  # per second, a cautious guess: what would take hopelessly long is not even tried once
COMPILED_SECONDS = 60.0  # from here on FlexAttention on a CPU, whose programs take 20 s to compile, enters


@dataclass(frozen=True)
class Planned:
    """A search with its share of the time.

    Attributes:
        size: valid configurations.
        seconds: this search's share of the time.
        candidates: how many of them the time is enough for.
        call_seconds: one call of the default, measured on a CPU.
        estimate: seconds it will probably take.
        refusal: why it is left out, or "".
    """

    job: Job
    size: int
    seconds: float
    candidates: int = 0
    call_seconds: float = 0.0
    estimate: float = 0.0
    refusal: str = ""


def jobs_of(
    problem: Problem, backend: str, seconds: float, *, document_ids: Tensor | None = None, decode: bool = False
) -> list[Job]:
    """List the searches that a problem asks for; the one that chooses between backends comes last.

    Args:
        problem: `needs_grad` tells whether the backward is tuned too.
        backend, seconds: as `tune`.
        document_ids: as `Inputs`; on the CPU.
        decode: a step of `swat_decode`, of q_len new tokens and the kv_len = window + q_len − 1 keys they see.

    Raises:
        NotImplementedError: a backend asked for by name that cannot run the problem.
        ValueError: a problem that cannot be checked, or a backend without anything to tune.
    """
    if problem.activation == "tanh-sigmoid" or problem.dtype == torch.float64:
        raise ValueError(
            "tune: expected 'sigmoid' or 'softmax' in float32, bfloat16 or float16, whose results can be checked, "
            f"got {problem.activation!r} in {problem.dtype}"
        )
    if decode:
        if backend not in ("auto", "triton"):
            raise ValueError(f"backend: expected one that has something to tune in decoding, triton, got {backend!r}")
        if backend == "triton" and (reason := triton.supports(problem)):
            raise NotImplementedError(f"backend='triton': {reason}")
        return [Job(triton.DECODE.name, "triton", problem)]  # where "auto" cannot run it here, the plan says why
    if backend == "auto":
        candidates = [
            name for name, module in dispatch.BACKENDS.items() if name != "naive" and module.supports(problem) is None
        ]
        if problem.device.type == "cpu":
            compiled = ["flex"] if "flex" in candidates and seconds >= COMPILED_SECONDS else []
            candidates = ["cpp" if "cpp" in candidates else "banded", *compiled]
        elif len(candidates) > 1:
            candidates.remove("banded")  # right everywhere, fused nowhere
    else:
        dispatch.choose(problem, backend)
        candidates = [backend]
    searches = [(t.name, name) for name in candidates for t in dispatch.BACKENDS[name].tunables(problem)]
    if not searches:
        raise ValueError(f"backend: expected one that has something to tune on {problem.device.type}, got {backend!r}")
    if len(candidates) > 1:
        searches.append((dispatch.BACKEND.name, "auto"))
    return [Job(tunable, name, problem, document_ids) for tunable, name in searches]


def plan(jobs: Sequence[Job], seconds: float) -> list[Planned]:
    """Give each search an equal share of the time, and say how many candidates fit into it."""
    return [_planned(job, seconds / len(jobs)) for job in jobs]


def _planned(job: Job, seconds: float) -> Planned:
    size = len(job.find().space(job.problem).candidates)
    if job.tunable == triton.DECODE.name and (reason := triton.supports(job.problem)):
        return Planned(job, size, seconds, refusal=f"{reason}; what decodes here has nothing to tune")
    if job.problem.device.type != "cpu":
        estimate = min(seconds, size * GPU_COMPILE_SECONDS)
        return Planned(job, size, seconds, enough_for(size, 0.0, seconds), estimate=estimate)
    call = _call_seconds(job, seconds)
    if LEAST * call > seconds:
        refusal = f"one call takes about {call:.2g} s here, a comparison {LEAST} calls; its share is {seconds:.3g} s"
        return Planned(job, size, seconds, refusal=refusal)
    candidates = enough_for(size, call, seconds)
    estimate = min(seconds, (candidates * CALLS + FINAL) * max(call, SAMPLE_SECONDS))
    return Planned(job, size, seconds, candidates, call, estimate)


def enough_for(size: int, call_seconds: float, seconds: float) -> int:
    """Count how many of `size` candidates fit into `seconds`, at least two.

    Without a call's time (0.0) a candidate costs its compilation, which takes far longer than its calls.
    """
    sample = max(call_seconds, SAMPLE_SECONDS)
    each, last = (CALLS * sample, FINAL * sample) if call_seconds else (GPU_COMPILE_SECONDS, 0.0)
    return max(2, min(size, int((seconds - last) / each)))


def _call_seconds(job: Job, seconds: float) -> float:
    """Return the seconds of one call of the default on a CPU: measured, or guessed where a call would take too long."""
    problem = job.problem
    guess = problem.flops(backward=problem.needs_grad) / CPU_FLOPS
    if LEAST * guess > 4 * seconds:
        return guess
    run = SwatTask(job).prepare(job.find().default(problem))
    run()
    start = time.perf_counter()
    run()
    run()
    return (time.perf_counter() - start) / 2
