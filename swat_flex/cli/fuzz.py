"""`swat-flex fuzz`: search for a call that a backend gets wrong."""

from __future__ import annotations

import importlib.util
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from swat_flex.testing.campaign import Campaign, Count
from swat_flex.testing.fuzz import Failure, Plan
from swat_flex.testing.workers import Broken, Passed, Search, Started, Warm, workers_for

NOTE = "use: worst share of what rounding explains in one element; trend: of what all rows may be too large together"
EVERY = 10.0  # seconds between lines where there is no terminal


@dataclass(slots=True)
class _Tally:
    """What was checked, by kind and dtype."""

    counts: dict[tuple[str, str], Count] = field(default_factory=dict)
    begin: float | None = None

    def add(self, passed: Passed) -> None:
        self.counts.setdefault((passed.kind, passed.dtype), Count()).add(passed.verdict)

    @property
    def cases(self) -> int:
        return sum(count.cases for count in self.counts.values())

    @property
    def seconds(self) -> float:
        return 0.0 if self.begin is None else time.monotonic() - self.begin

    def line(self) -> str:
        worst = max((count.use for count in self.counts.values()), default=0.0)
        return f"{self.cases:,} cases in {self.seconds:.0f} s, worst use {worst:.2f}"

    def table(self) -> Table:
        table = Table("backend", "dtype", box=box.SIMPLE, title=self.line(), title_justify="left")
        for name in ("cases", "excluded", "worst use", "of", "trend"):
            table.add_column(name, justify="right")
        for (kind, dtype), count in sorted(self.counts.items()):
            use = f"{count.use:.2f}"
            table.add_row(kind, dtype, f"{count.cases:,}", str(count.excluded), use, count.of, f"{count.trend:.2f}")
        return table


def fuzz(
    seconds: Annotated[float, typer.Option(help="How long to search, from the end of the warm-up on.")] = 60.0,
    backend: Annotated[str, typer.Option(help="all, or some of cpp,banded,naive,flex,triton.")] = "all",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"all, or some of {','.join(options.DTYPES)}.")] = "all",
    seed: Annotated[
        int | None, typer.Option(help="The same seed and --workers draw the same cases; a new one each time.")
    ] = None,
    emulate: Annotated[
        str | None,
        typer.Option(
            help=f"Run triton's code for one of {', '.join(EXECUTABLE)} on the CPU, instruction by instruction."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0: one per core up to two, one on a GPU.")] = 0,
    replay: Annotated[Path | None, typer.Option(help="Run the failure in this file again, and nothing else.")] = None,
    output: Annotated[Path, typer.Option(help="Where a failure is written.")] = Path("swat-fuzz-failure.json"),
    record: Annotated[
        Path | None, typer.Option(help="Add the run's counts to those of earlier ones in this file.")
    ] = None,
    cases: Annotated[
        int, typer.Option(help="With --record: go on with new seeds, --seconds each, until it holds so many cases.")
    ] = 0,
) -> None:
    """Search for a call that a backend gets wrong: random cases against the exact result.

    Stops at the first failure, made as small as it gets, and writes a file that --replay runs. Exit status 1 then.
    """
    console = screen.console()
    if replay is not None:
        _replay(console, replay)
        return
    if importlib.util.find_spec("hypothesis") is None:
        raise typer.BadParameter('expected hypothesis to be installed: pip install "swat_flex[fuzz]", got none')
    if not seconds > 0:
        raise options.refused("--seconds", "more than 0", seconds)
    options.whole("--workers", workers, 0, 256)
    if not output.parent.is_dir():
        raise options.refused("--output", "a file in an existing folder", str(output))
    if emulate is not None:
        _check_emulation(emulate, backend)
    place = str(options.device("cpu" if emulate is not None else device))
    if cases and (record is None or seed is not None):
        raise options.refused("--cases", "--record and no --seed beside it", cases)
    try:
        campaign = None if record is None else Campaign.load(record)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"expected a record of this command: {error}", param_hint="--record") from error
    plan = Plan(_backends(console, backend, place, emulate), place, _dtypes(dtype), seed or 0, emulate=emulate)
    try:
        for name in plan.backends:
            engine.cases(plan, name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--dtype") from error
    while True:
        plan = replace(plan, seed=secrets.randbelow(2**31) if seed is None else seed)
        failure, interrupted = _search(console, plan, seconds, workers or workers_for(place), campaign)
        if campaign is not None:
            console.print(f"{campaign.path}: {campaign.cases:,} cases of {campaign.seeds} seeds")
        if failure is not None or interrupted or campaign is None or campaign.cases >= cases:
            break
    if failure is not None:
        failure.save(output)
        console.print(f"FAILED\n{failure.text}\n\n{failure.reproducer()}\n", soft_wrap=True)
        console.print(f"Written to {output}; again with: swat-flex fuzz --replay {output}", soft_wrap=True)
        raise typer.Exit(1)


def _replay(console: Console, path: Path) -> None:
    try:
        failure = Failure.load(path)
    except (OSError, ValueError) as error:
        told = f"expected a file that swat-flex fuzz wrote: {error}"
        raise typer.BadParameter(told, param_hint="--replay") from error
    again = engine.replay(failure)
    if again is None:
        console.print(f"Passes now: {failure.case} on {failure.backend}", soft_wrap=True)
        return
    console.print(f"FAILED\n{again.text}", soft_wrap=True)
    raise typer.Exit(1)


def _check_emulation(target: str, backend: str) -> None:
    options.one_of("--emulate", target, EXECUTABLE)
    if backend not in ("all", "triton"):
        raise options.refused("--backend", "triton, whose code is emulated", backend)
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


def _search(
    console: Console, plan: Plan, seconds: float, workers: int, campaign: Campaign | None
) -> tuple[Failure | None, bool]:
    """The failure found, and whether Ctrl-C or SIGTERM ended the search, after the summary is printed and recorded."""
    tally = _Tally()
    failure: Failure | None = None
    interrupted = False
    place = plan.device if plan.emulate is None else f"{plan.emulate} emulated"
    console.print(f"seed {plan.seed}, {place}, {workers} processes: {', '.join(plan.backends)}")
    try:
        with _terminable(), Search(plan, seconds, workers) as messages, _shown(console, tally) as show:
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
        interrupted = True
        console.print("Stopped.")
    console.print(tally.table())
    console.print(NOTE)
    if campaign is not None:
        run = {"seed": plan.seed, "seconds": round(tally.seconds, 1), "workers": workers, "backends": plan.backends}
        campaign.add(tally.counts, **run, failure=None if failure is None else failure.text)
    return failure, interrupted


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: what was checked so far is still counted."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
