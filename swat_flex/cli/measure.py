"""Time attention functions side by side, forward and forward with backward, and count the memory they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autotune import Timing, clock_for, time_together
from autotune.memory import peak_bytes
from swat_flex.cli.text import Inputs

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of one function at one length.

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
    """Time all functions in interleaved rounds, so that a slow moment of the machine meets each of them.

    `advance` is called after each warm-up and each sample, `2 · (rounds + 1)` times per function.
    """
    device, leaves = inputs.q.device, (inputs.q, inputs.k, inputs.v)

    def forward(function: Attention) -> Callable[[], object]:
        return lambda: torch.no_grad()(function)(*leaves)

    def both(function: Attention) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, inputs.grad)

    runs = {(name, make.__name__): make(f) for name, f in functions.items() for make in (forward, both)}
    clock = clock_for(device, graphs=False)
    times = time_together(runs, clock, rounds, on_sample=lambda *_: advance())
    if times.failed:
        raise RuntimeError("; ".join(f"{name} {passes}: {why}" for (name, passes), why in times.failed.items()))
    peaks = {name: peak_bytes(runs[name, "both"], device) for name in functions}
    timings = times.timings
    return {name: Measurement(timings[name, "forward"], timings[name, "both"], peaks[name]) for name in functions}
