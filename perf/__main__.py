"""`python -m perf`: measure a suite; read a record back; write the pages' figures; the report of a GPU."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perf import bars, gpu_report, gpu_steps, load, picture, readme, regression, report
from perf.measure import Advance, Setting
from perf.record import RESULTS, Record, save, surroundings
from perf.record import load as read
from perf.suites import SUITES, run_suite, suite

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Json = Annotated[Path | None, typer.Option("--json", help="Write the record into this file.")]
Png = Annotated[Path | None, typer.Option("--png", help="Draw the record into this file.")]
BusyOk = Annotated[bool, typer.Option("--busy-ok", help="Measure although other processes load the machine.")]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer cases and rounds; a CPU ends within 3 minutes.")]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    suite_name: Annotated[str, typer.Option("--suite", help=f"{', '.join(SUITES)}.")] = "cpu",
    quick: Quick = False,
    json_file: Json = None,
    png_file: Png = None,
    busy_ok: BusyOk = False,
) -> None:
    """Time SWAT beside what a PyTorch user would pick instead. No time without a passed check."""
    if context.invoked_subcommand is not None:
        return
    try:
        chosen = suite(suite_name, quick)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--suite") from error
    if png_file is not None:
        picture.needs_matplotlib()
    before = _load_before(chosen.device.type, busy_ok)
    with _progress(sum(len(case.passes) for case in chosen.cases) * (len(chosen.peers) + 1)) as advance:
        races = run_suite(chosen, quick, advance)
    about = surroundings(str(chosen.device))
    finish(Record(suite_name, quick, load_before=before, busy_ok=busy_ok, races=races, **about), json_file, png_file)


def finish(record: Record, json_file: Path | None, png_file: Path | None) -> None:
    """Save first, then print and draw; exit status 1 where a contender of ours was wrong or failed."""
    if json_file is not None:
        save(record, json_file)
    report.show(record, _console())
    if png_file is not None:
        picture.save(picture.draw(record), png_file)
    if any(row.ours and row.status in ("refused", "failed") for race in record.races for row in race.rows):
        raise typer.Exit(1)


@app.command("bars")
def bars_(quick: Quick = False, json_file: Json = None, busy_ok: BusyOk = False) -> None:
    """Time what the kernels of a CPU are held to, all in the same rounds; within 8 minutes."""
    before = _load_before("cpu", busy_ok)
    with _progress(sum(len(peers) for _, _, peers in bars.contests()) + 3) as advance:
        races, figures = bars.measure(Setting.of(torch.device("cpu"), quick), advance)
    about = surroundings("cpu") | {"load_before": before, "busy_ok": busy_ok}
    finish(Record("bars", quick, races=races, figures=figures, **about), json_file, None)


@app.command("report")
def report_(
    file: Annotated[Path, typer.Argument(help="A record written with --json.")],
    png_file: Png = None,
) -> None:
    """Print the tables of a record, and draw it again."""
    try:
        record = read(file)
    except (OSError, ValueError) as error:
        _fail(str(error))
    report.show(record, _console())
    if png_file is not None:
        picture.save(picture.draw(record), png_file)


@app.command("readme")
def readme_(
    file: Annotated[Path | None, typer.Argument(help="The record to quote; without one, that quoted now.")] = None,
) -> None:
    """Write the measured figures of README.md and docs/benchmarks.md from a record."""
    try:
        changed = [page.name for page in readme.PAGES if readme.rewrite(page, file)]
    except (OSError, ValueError) as error:
        _fail(str(error))
    typer.echo(f"rewritten: {', '.join(changed) or 'nothing, the pages already say so'}")


@app.command("regression")
def regression_(
    file: Annotated[Path, typer.Argument(help="What pytest-benchmark wrote with --benchmark-json.")],
    save_: Annotated[bool, typer.Option("--save", help="Make it the baseline.")] = False,
) -> None:
    """Compare benchmarks with the saved baseline, as ratios to a matrix product in the same run."""
    try:
        if save_:
            regression.save(file)
            typer.echo(f"saved as {regression.BASELINE.name}")
            return
        table, slower = regression.compare(file)
    except (OSError, ValueError) as error:
        _fail(str(error))
    _console().print(table)
    if slower:
        _fail(f"slower than the baseline by more than {regression.TOLERANCE:.0%}: {', '.join(slower)}")


@app.command("gpu-report")
def gpu_report_(
    seconds: Annotated[int, typer.Option(help="Limit for everything together.")] = 1500,
    folder: Annotated[Path, typer.Option(help="Where report.jsonl, report.log, <device>.json and .png go.")] = RESULTS,
    only: Annotated[str, typer.Option("--steps", help="The steps whose names begin so, separated by ;.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Every step on a CPU, on tiny cases.")] = False,
) -> None:
    """Check, measure and tune on a GPU, step by step; what a step measured is kept however it ends."""
    try:
        gpu_steps.place(dry_run)
        names = [name.strip() for name in only.split(";")]
        steps = [step for step in gpu_report.plan(dry_run) if step.name.startswith(tuple(names))]
        if not steps:
            raise ValueError(f"--steps: expected some of {[step.name for step in gpu_report.plan()]}, got {only!r}")
        gpu_report.run(steps, folder, seconds)
        file = gpu_report.write_record(folder)
    except (RuntimeError, OSError, ValueError) as error:
        _fail(str(error))
    typer.echo(f"written: {file}")
    if importlib.util.find_spec("matplotlib") and read(file).races:
        picture.save(picture.draw(read(file)), file.with_suffix(".png"))


@app.command("gpu-step", hidden=True)
def gpu_step_(
    step: str,
    name: Annotated[str, typer.Argument()] = "",
    passes: Annotated[str, typer.Argument()] = "forward",
    seconds: float = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run")] = False,
) -> None:
    """Run one step of a GPU's report and print its results as JSON lines."""
    match step:
        case "versions":
            gpu_steps.versions(dry_run)
        case "first":
            gpu_steps.first(name, dry_run)
        case "race":
            gpu_steps.race(name, "both" if passes == "both" else "forward", seconds, dry_run)
        case _:
            gpu_steps.ncu(dry_run)


def _load_before(device: str, busy_ok: bool) -> dict[str, float | int | None]:
    """What others use of the machine, for the record; ends the command where they disturb and nobody insists."""
    before = load.look(device)
    if before.busy and not busy_ok:
        _fail(f"{before.busy}: stop them, or measure all the same with --busy-ok, which the record will tell")
    if before.busy:
        Console(stderr=True).print(f"WARNING: {before.busy}", style="bold red")
    return asdict(before)


@contextmanager
def _progress(total: int) -> Iterator[Advance]:
    """A bar on standard error where that is a terminal, else a line for every race."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task, start = progress.add_task("", total=total), time.monotonic()

        def advance(what: str) -> None:
            progress.update(task, description=what, advance=1)
            if progress.disable and what.endswith("rounds"):
                print(f"{time.monotonic() - start:4.0f} s  {what}", file=sys.stderr, flush=True)

        yield advance


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False, emoji=False)


def _fail(text: str) -> NoReturn:
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m perf")
