"""`swat-flex fuzz`: search for a call that a backend gets wrong."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from swat_flex.cli import options, screen
from swat_flex.inspection import EXECUTABLE
from swat_flex.problem import Backend
from swat_flex.testing import fuzz as engine
from swat_flex.testing.check import Verdict
from swat_flex.testing.fuzz import Failure, Plan
from swat_flex.testing.workers import Broken, Passed, Search, Started, Warm, workers_for

NOTE = (
    "use: worst share of the error budget, up to 2 in float32, where logits far from 0 amplify rounding; "
    "what exceeds it in one draw is judged, and shown, on up to 64 draws together"
)
EVERY = 10.0  # seconds between lines where there is no terminal


@dataclass(slots=True)
class _Count:
    cases: int = 0
    excluded: int = 0
    worst: Verdict = field(default_factory=Verdict)


@dataclass(slots=True)
class _Tally:
    """What was checked, by backend and dtype."""

    counts: dict[tuple[str, str], _Count] = field(default_factory=dict)
    begin: float | None = None

    def add(self, passed: Passed) -> None:
        count = self.counts.setdefault((passed.backend, passed.dtype), _Count())
        count.cases += not passed.verdict.excluded
        count.excluded += passed.verdict.excluded
        count.worst = max(count.worst, passed.verdict, key=lambda verdict: verdict.use)

    @property
    def cases(self) -> int:
        return sum(count.cases for count in self.counts.values())

    def line(self) -> str:
        seconds = 0.0 if self.begin is None else time.monotonic() - self.begin
        worst = max((count.worst.use for count in self.counts.values()), default=0.0)
        return f"{self.cases:,} cases in {seconds:.0f} s, worst use {worst:.2f}"

    def table(self) -> Table:
        table = Table("backend", "dtype", box=box.SIMPLE, title=self.line(), title_justify="left")
        for name in ("cases", "excluded", "worst use", "of"):
            table.add_column(name, justify="right")
        for (backend, dtype), count in sorted(self.counts.items()):
            use, of = f"{count.worst.use:.2f}", count.worst.name
            table.add_row(backend, dtype, f"{count.cases:,}", str(count.excluded), use, of)
        return table


def fuzz(
    seconds: Annotated[float, typer.Option(help="How long to search, from the end of the warm-up on.")] = 60.0,
    backend: Annotated[str, typer.Option(help="all, or some of banded,flex,triton.")] = "all",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"all, or some of {','.join(options.DTYPES)}.")] = "all",
    seed: Annotated[int, typer.Option(help="The same seed draws the same cases.")] = 0,
    emulate: Annotated[
        str | None,
        typer.Option(
            help=f"Run triton's code for one of {', '.join(EXECUTABLE)} on the CPU, instruction by instruction."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0: one per core up to two, one on a GPU.")] = 0,
    replay: Annotated[Path | None, typer.Option(help="Run the failure in this file again, and nothing else.")] = None,
    output: Annotated[Path, typer.Option(help="Where a failure is written.")] = Path("swat-fuzz-failure.json"),
) -> None:
    """Search for a call that a backend gets wrong: random cases against the definition in float64.

    Stops at the first failure, made as small as it gets, and writes a file that --replay runs. Exit status 1 then.
    """
    console = screen.console()
    if replay is not None:
        _replay(console, replay)
        return
    if importlib.util.find_spec("hypothesis") is None:
        raise typer.BadParameter('expected hypothesis to be installed: pip install "swat_flex[fuzz]", got none')
    if not seconds > 0:
        raise typer.BadParameter(f"expected more than 0, got {seconds}", param_hint="--seconds")
    options.whole("--workers", workers, 0, 256)
    if not output.parent.is_dir():
        raise typer.BadParameter(f"expected a file in an existing folder, got {str(output)!r}", param_hint="--output")
    if emulate is not None:
        _check_emulation(emulate, backend)
    place = str(options.device("cpu" if emulate is not None else device))
    plan = Plan(_backends(console, backend, place, emulate), place, _dtypes(dtype), seed, emulate=emulate)
    _check_dtypes(plan)
    failure = _search(console, plan, seconds, workers or workers_for(place))
    if failure is not None:
        failure.save(output)
        console.print(f"FAILED\n{failure.text}\n\n{failure.reproducer()}\n", soft_wrap=True)
        console.print(f"Written to {output}; again with: swat-flex fuzz --replay {output}", soft_wrap=True)
        raise typer.Exit(1)


def _replay(console: Console, path: Path) -> None:
    try:
        failure = Failure.load(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"expected a file that swat-flex fuzz wrote: {error}", param_hint="--replay"
        ) from error
    again = engine.replay(failure)
    if again is None:
        console.print(f"Passes now: {failure.case} on {failure.backend}", soft_wrap=True)
        return
    console.print(f"FAILED\n{again.text}", soft_wrap=True)
    raise typer.Exit(1)


def _check_emulation(target: str, backend: str) -> None:
    options.one_of("--emulate", target, tuple(EXECUTABLE))
    if backend not in ("all", "triton"):
        raise typer.BadParameter(f"expected triton, whose code is emulated, got {backend!r}", param_hint="--backend")
    for package, extra in (("triton", ""), ("numpy", "emulate")):
        if importlib.util.find_spec(package) is None:
            source = f': pip install "swat_flex[{extra}]"' if extra else ""
            raise typer.BadParameter(f"expected {package} to be installed{source}, got none", param_hint="--emulate")


def _backends(console: Console, text: str, device: str, emulate: str | None) -> tuple[Backend, ...]:
    """Choose the backends asked for, or all that run on the device; print why each other one does not."""
    known = engine.available(device, emulate)
    if text == "all":
        for name, reason in known.items():
            if reason is not None:
                console.print(f"not {name}: {reason}")
        return tuple(name for name, reason in known.items() if reason is None)
    chosen = []
    for word in text.split(","):
        asked = options.one_of("--backend", word.strip(), ("all", *known))
        chosen += [name for name in known if name == asked]
        if chosen and known[chosen[-1]] is not None:
            raise typer.BadParameter(f"{known[chosen[-1]]}", param_hint="--backend")
    return tuple(dict.fromkeys(chosen))


def _dtypes(text: str) -> tuple[str, ...] | None:
    if text == "all":
        return None
    return tuple(options.one_of("--dtype", word.strip(), options.DTYPES) for word in text.split(","))


def _check_dtypes(plan: Plan) -> None:
    for name in plan.backends:
        try:
            engine.cases(plan, name)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--dtype") from error


def _search(console: Console, plan: Plan, seconds: float, workers: int) -> Failure | None:
    """The failure found, after the summary is printed; Ctrl-C ends the search, not the summary."""
    tally = _Tally()
    failure: Failure | None = None
    place = plan.device if plan.emulate is None else f"{plan.emulate} emulated"
    console.print(f"seed {plan.seed}, {place}, {workers} processes: {', '.join(plan.backends)}")
    try:
        with Search(plan, seconds, workers) as messages, _shown(console, tally) as show:
            for message in messages:
                if isinstance(message, Warm):
                    console.print(f"{message.backend} warmed up in {message.seconds:.1f} s")
                elif isinstance(message, Started):
                    tally.begin = time.monotonic()
                elif isinstance(message, Passed):
                    tally.add(message)
                    show()
                elif isinstance(message, Failure):
                    failure = message
                elif isinstance(message, Broken):
                    console.print(f"error: {message.text}")
                    raise typer.Exit(1)
    except KeyboardInterrupt:
        console.print("Stopped.")
    console.print(tally.table())
    console.print(NOTE)
    return failure


@contextmanager
def _shown(console: Console, tally: _Tally) -> Iterator[Callable[[], None]]:
    """Call what it gives after each case: a table that grows on a terminal, a line now and then elsewhere."""
    last = time.monotonic()

    def line() -> None:
        nonlocal last
        if time.monotonic() - max(last, tally.begin or 0.0) > EVERY:
            last = time.monotonic()
            console.print(tally.line())

    if not sys.stdout.isatty():
        yield line
        return
    with Live(console=console, get_renderable=tally.table, refresh_per_second=4, transient=True):
        yield lambda: None
