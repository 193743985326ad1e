"""Time attention functions side by side, forward and forward with backward, and the memory they take."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swat_flex.cli.text import Inputs

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

CALLS = 10  # calls in one sample on an accelerator, which share one synchronisation


@dataclass(frozen=True, slots=True)
class Timing:
    """Median in milliseconds per call, and its spread: the interquartile range over the median."""

    ms: float
    spread: float

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """From samples in milliseconds per call; one sample has no spread."""
        median = statistics.median(samples)
        if len(samples) == 1:
            return cls(median, 0.0)
        lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, (upper - lower) / median)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One function at one length.

    Attributes:
        forward: without recording for a backward.
        both: forward and backward.
        peak_bytes: memory that forward and backward needed at once beyond the inputs, output and gradients included;
            None where the system does not tell.
    """

    forward: Timing
    both: Timing
    peak_bytes: int | None


def measure(
    functions: Mapping[str, Attention], inputs: Inputs, rounds: int, advance: Callable[[], object]
) -> dict[str, Measurement]:
    """Rounds in which each function runs in turn, so that a slow moment of the machine meets all of them.

    `advance` is called after each function's warm-up and after each of its samples, `rounds + 1` times per function.
    """
    device = inputs.q.device
    passes, peaks = {}, {}
    for name, function in functions.items():
        passes[name] = _forward(function, inputs), _both(function, inputs)
        for run in passes[name]:
            run()
        peaks[name] = peak_bytes(passes[name][1], device)
        advance()
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in functions}
    for _ in range(rounds):
        for name, runs in passes.items():
            for run, times in zip(runs, samples[name], strict=True):
                times.append(_sample_ms(run, device))
            advance()
    return {
        name: Measurement(Timing.of(forward), Timing.of(both), peaks[name]) for name, (forward, both) in samples.items()
    }


def _forward(function: Attention, inputs: Inputs) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(inputs.q, inputs.k, inputs.v)

    return run


def _both(function: Attention, inputs: Inputs) -> Callable[[], object]:
    leaves = (inputs.q, inputs.k, inputs.v)
    return lambda: torch.autograd.grad(function(*leaves), leaves, inputs.grad)


def _sample_ms(run: Callable[[], object], device: torch.device) -> float:
    calls = 1 if device.type == "cpu" else CALLS
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3 / calls


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a run needed at its peak beyond what was held before it, in bytes; None where no one counts it.

    On CUDA the allocator's own count; on Linux's CPUs the resident set, which sees every library's workspaces.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _lower_high_water_mark():
        return None
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _lower_high_water_mark() -> bool:
    """Bring the resident set's high-water mark down to the present; False where the system cannot.

    The heap is trimmed first, so that memory freed earlier is not taken for memory in use.
    """
    if sys.platform != "linux":
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):  # a C library without malloc_trim, or a sandbox without clear_refs
        return False
    return True


def _resident(field: str) -> int:
    """A field of the process's status, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024  # "1234 kB"
