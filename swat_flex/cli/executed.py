"""`swat-flex inspect --run`: compiled kernels executed on this machine's CPU, and what that shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import typer
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor

from swat_flex.cli import options, screen
from swat_flex.decode import RingCache, swat_decode
from swat_flex.inspection import EXECUTABLE, Launched, emulated, launches_executed
from swat_flex.problem import WindowLike
from swat_flex.reference import naive_swat
from swat_flex.testing.case import SwatCase

NOTE = "Executed instruction by instruction on the CPU; it says what the code computes, not how long a GPU takes."
LENGTH, REACH = 300, 200  # tokens; a window's side at most, so that both of its edges are met
Pairs = Mapping[str, tuple[Tensor, Tensor]]  # by name a result, and what it should be


@dataclass(frozen=True)
class Work:
    """Something that launches kernels: what it is in words, a context in which launches are executed, and the call."""

    words: str
    context: Callable[[str], AbstractContextManager[list[Launched]]]
    call: Callable[[], Any]


def own(head_dim: int, window: WindowLike) -> list[Work]:
    """Forward, backward and a step of decoding, each in its default configuration."""
    case = SwatCase(
        LENGTH, _short(window), batch=1, kv_heads=1, group=2, head_dim=head_dim, value_dim=head_dim, dtype="bfloat16",
        slopes="tensor", steepness=1 / LENGTH, logit_bias="tensor",
    )  # fmt: skip
    shape = f"bfloat16, 2 query heads, 1 key head, D = {head_dim}"

    def attend() -> Pairs:
        exact = case.truth().exact
        return {name: (x, exact[name]) for name, x in case.call("triton").items()}

    return [
        Work(f"{LENGTH} tokens, window {case.window}, {shape}", emulated, attend),
        Work(f"a token after {LENGTH}, window {REACH}, {shape}", emulated, lambda: _step(head_dim)),
    ]


def _short(window: WindowLike) -> WindowLike:
    if isinstance(window, tuple):
        left, right = (side if side is None else min(side, REACH) for side in window)
        return left, right
    return window if window is None else min(window, REACH)


def _step(head_dim: int) -> Pairs:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, LENGTH, head_dim, generator=draw).bfloat16() for n in (2, 1, 1))
    cache = RingCache(1, 1, REACH, head_dim, dtype=torch.bfloat16)
    cache.append(k, v)
    out = swat_decode(q[:, :, -1:], cache, backend="triton")
    return {"out": (out, naive_swat(q.double(), k.double(), v.double(), REACH)[:, :, -1:])}


def run(target: str, works: list[Work]) -> list[dict[str, Any]]:
    """Execute works, print what was found and return it, for a file; the first that breaks a rule is the last."""
    options.one_of("--target", target, EXECUTABLE)
    try:
        from swat_flex.inspection.ptx import Fault
    except ImportError as error:
        told = f'expected numpy to be installed: pip install "swat_flex[emulate]", got {error}'
        raise typer.BadParameter(told, param_hint="--run") from error
    console, records = screen.console(), []
    for work in works:
        console.print(f"{work.words}, {target}")
        fault, pairs = None, {}
        with work.context(target) as ran:
            try:
                pairs = work.call()
            except Fault as found:
                fault = found
        records.append(_record(work, ran, pairs if isinstance(pairs, Mapping) else {}, fault))
        for launched in ran:
            console.print(_launch(launched))
        if records[-1]["results"]:
            console.print(_results(records[-1]["results"]))
        if fault is not None:
            console.print(f"FAULT\n{fault}", soft_wrap=True, markup=False)
            break
        if not ran:
            told = "expected a function that launches kernels on CPU tensors, got one that launches none"
            raise typer.BadParameter(told, param_hint="MODULE:KERNEL")
        console.print("")
    console.print(NOTE)
    return records


def of_function(name: str, function: Any) -> Work:
    """Work of a user's own: a function without arguments that launches kernels."""
    if not callable(function) or hasattr(function, "fn"):
        rule = "a function that launches the kernel on CPU tensors and may return {name: (found, exact)}"
        told = f"expected with --run {rule}, got {type(function).__name__}"
        raise typer.BadParameter(told, param_hint="MODULE:KERNEL")
    return Work(name, launches_executed, function)


def _record(work: Work, ran: list[Launched], pairs: Pairs, fault: Exception | None) -> dict[str, Any]:
    return {
        "case": work.words,
        "launches": [
            {
                "kernel": launched.name,
                "grid": list(launched.grid),
                "instructions": launched.execution.instructions,
                "missed": len(launched.execution.missed),
                "undefined": list(launched.execution.undefined),
                "writes": {name: _writes(x) for name, x in launched.execution.writes.items()},
            }
            for launched in ran
        ],
        "results": {name: _errors(*pair) for name, pair in pairs.items()},
        "fault": None if fault is None else str(fault),
        "note": NOTE,
    }


def _writes(count: Tensor) -> dict[int, int]:
    """How many elements were written so many times."""
    return dict(sorted(Counter(count.flatten().tolist()).items()))


def _errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    error = found.double() - exact.double()
    return {
        "relative": float(error.norm()) / (float(exact.double().norm()) or 1.0),
        "largest": float(error.abs().max()),
        "exact_largest": float(exact.abs().max()),
    }


def _launch(launched: Launched) -> Table:
    table = Table(Column(style="bold"), "", box=None, show_header=False, pad_edge=False)
    execution, metadata = launched.execution, launched.kernel.metadata
    blocks = " × ".join(str(n) for n in launched.grid)
    shared = f"{metadata.shared} bytes of shared memory"
    table.add_row(escape(launched.name), f"{blocks} blocks, {metadata.num_warps} warps, {shared}")
    lines = Counter(place for place in execution.missed.values() if place)
    where = f", most of {lines.most_common(1)[0][0]}" if lines else ""
    table.add_row("  instructions", f"{execution.instructions}, {len(execution.missed)} never ran{escape(where)}")
    if execution.undefined:
        table.add_row("  undefined", f"reads registers that nothing writes: {', '.join(execution.undefined)}")
    written = {name: _writes(x) for name, x in execution.writes.items() if x.any()}
    for name, counts in written.items():
        words = [f"{many:,} elements {_times(n)}" for n, many in counts.items()]
        table.add_row(f"  {escape(name)}", f"written: {', '.join(words)}")
    if untouched := [name for name in execution.writes if name not in written]:
        table.add_row("  not written", escape(", ".join(untouched)))
    return table


def _times(n: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(n, f"{n} times")


def _results(errors: Mapping[str, Mapping[str, float]]) -> Table:
    columns = [Column(name, justify="right") for name in ("relative error", "largest error", "largest element")]
    table = Table("against float64", *columns, box=None, pad_edge=False, header_style="bold")
    for name, found in errors.items():
        table.add_row(escape(name), *(f"{x:.2e}" for x in found.values()))
    return table
