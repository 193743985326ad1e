"""What `swat-flex demo` says about its times: a table, its notes, and a sentence."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table
from torch import Tensor

from autotune import Timing
from swat_flex.cli.measure import Measurement
from swat_flex.problem import Problem, WindowLike

CONTENDERS = ("SWAT", "naive", "SDPA")

UNSTEADY = 0.3  # a spread beyond which a ratio of medians says little

Results = dict[int, dict[str, Measurement]]  # by length, then by contender


def table(results: Results, q: Tensor, window: WindowLike) -> Table:
    """One section per length, one row per contender; "-" where one was not run or a quantity is not known."""
    page = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    page.add_column("\ntokens", justify="right")
    page.add_column("\n")
    for column in ("forward\nms   ±", "\nGFLOP/s", "fwd + bwd\nms   ±", "\nGFLOP/s", "peak\nMiB"):
        page.add_column(column, justify="right")
    page.add_column("speed-up\nforward", justify="right")  # the two heads read across: speed-up of SWAT
    page.add_column("of SWAT\nfwd + bwd", justify="right")
    for length, measured in results.items():
        for name in CONTENDERS:
            label = f"{length:,}" if name == CONTENDERS[0] else ""
            page.add_row(label, name, *_cells(measured, name, length, q, window), end_section=name == CONTENDERS[-1])
    return page


def _cells(measured: dict[str, Measurement], name: str, length: int, q: Tensor, window: WindowLike) -> list[str]:
    if name not in measured:
        return ["-"] * 7
    mine, swat = measured[name], measured["SWAT"]
    problem = Problem.of_self_attention(
        q.shape[1], length, q.shape[3], q.dtype, q.device, None if name == "SDPA" else window
    )
    forward = problem.flops()
    both = forward + problem.flops(backward=True)
    peak = "-" if mine.peak_bytes is None else f"{mine.peak_bytes / 2**20:,.0f}"
    faster = ["", ""]
    if name != "SWAT":
        faster = [_times(mine.forward, swat.forward), _times(mine.both, swat.both)]
    return [*_timed(mine.forward, forward), *_timed(mine.both, both), peak, *faster]


def _timed(timing: Timing, flops: float) -> list[str]:
    return [f"{_ms(timing.median_ms)} {timing.spread:>4.0%}", f"{flops / timing.median_ms / 1e6:,.3g}"]


def _ms(ms: float) -> str:
    """Write a time with about three significant digits."""
    return f"{ms:,.{max(0, 2 - math.floor(math.log10(ms)))}f}"


def _times(other: Timing, swat: Timing) -> str:
    ratio = other.median_ms / swat.median_ms
    return f"{ratio:,.1f}×" if ratio >= 1 else f"{ratio:.2f}×"


def notes(results: Results, rounds: int) -> str:
    """Say how to read the table, and a warning where the machine was too busy to trust it."""
    text = (
        f"Medians of {rounds} interleaved rounds; ± is the interquartile range over the median. GFLOP/s counts the "
        "pairs that each one sees. Peak is the memory of forward and backward beyond the inputs."
    )
    timings = [timing for row in results.values() for mine in row.values() for timing in (mine.forward, mine.both)]
    widest = max(timing.spread for timing in timings)
    if widest > UNSTEADY:
        text += f"\nA spread of {widest:.0%}: this machine is busy with something else; stop it, or take more --rounds."
    return text


def series(results: Results) -> dict[str, list[float]]:
    """Milliseconds forward and backward per contender, in the order of the lengths; NaN where it was not run."""
    return {
        name: [measured[name].both.median_ms if name in measured else math.nan for measured in results.values()]
        for name in CONTENDERS
    }


def conclusion(results: Results) -> str:
    """Say what the newcomer saw, and the next thing to try, in one sentence."""
    first, last = min(results), max(results)
    swat, sdpa = results[last]["SWAT"].both.median_ms, results[last]["SDPA"].both.median_ms
    if first == last:
        seen = f"At {last:,} tokens forward and backward took SWAT {_ms(swat)} ms and SDPA {_ms(sdpa)} ms"
    else:
        swat, sdpa = swat / results[first]["SWAT"].both.median_ms, sdpa / results[first]["SDPA"].both.median_ms
        seen = (
            f"From {first:,} to {last:,} tokens, {last / first:.3g} times as many, "
            f"SWAT took {swat:.1f} times as long and SDPA {sdpa:.1f} times"
        )
    return f"{seen}; to see the band and the bias behind it, try: swat-flex show --window 16"
