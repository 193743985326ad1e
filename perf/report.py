"""A record as tables: for a terminal, and for README.md and docs/benchmarks.md."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from perf import bars, communication, scaling
from perf.cases import WORDS
from perf.load import CORES
from perf.measure import COPY, MATMUL
from perf.record import Race, Record, Row

UNSTEADY = 0.3  # a spread beyond which a ratio of medians says little
COLUMNS = ("ms", "±", "GFLOP/s", "of matmul", "GB/s", "of copy", "peak MiB", "speed-up", "max error", "of budget")


def show(record: Record, console: Console) -> None:
    """Print everything a record holds."""
    console.print(escape(header(record)))
    for race in record.races:
        console.print()
        console.print(table(race))
        for line in notes(race):
            console.print(escape(line), style="dim")
        if record.failed_tests:
            failed = f"{len(record.failed_tests)} tests failed in the same run, see below"
            console.print(failed, style="bold red")
    for test in record.failed_tests:
        console.print(escape(f"failed: {test}"), style="bold red")
    for step in record.steps:
        console.print(escape(f"{step['name']}: {step['outcome']}"))
    if record.suite == "scaling":
        console.print()
        console.print(scaling.table(record))
        console.print()
        console.print(communication.table())
        console.print(escape(communication.FORMULA), style="dim")
    if record.suite == "bars":
        console.print()
        console.print(bars_table(record))
        for line in bars.notes(record):
            console.print(escape(line))
    console.print()
    for warning in warnings(record):
        console.print(escape(f"WARNING: {warning}"), style="bold red")
    console.print(LEGEND, style="dim", markup=False)


def bars_table(record: Record) -> Table:
    """Everything that has a bar, and whether it holds."""
    page = Table("", Column("measured", justify="right"), "bar", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for line in bars.lines(record):
        page.add_row(escape(line.what), f"{line.value:.2f}", line.bound, "" if line.holds else "missed")
    return page


def header(record: Record) -> str:
    """What was measured, on what, with what."""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items() if version)
    device = record.device
    return (
        f"{device.name} ({device.kind} {device.capability}, {units_of(record)}); {versions}; commit {record.commit}; "
        f"suite {record.suite}{', quick' if record.quick else ''}, {record.created}"
    )


def units_of(record: Record) -> str:
    """Say how much of the device ran."""
    if record.device.kind != "cpu":
        return f"{record.device.units} multiprocessors"
    return "1 thread" if record.threads == 1 else f"{record.threads} threads"


def table(race: Race) -> Table:
    """One race: who was timed, then who was not and why."""
    title = f"{race.case.name}, {WORDS[race.passes]}: {race.case.sizes}\n{race.case.reason}"
    columns = [Column(name, justify="right") for name in COLUMNS]
    page = Table("", *columns, box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    chosen = race.row(race.chosen)
    for row in sorted(race.timed, key=lambda row: row.ms):
        style = "bold" if row.peer == race.chosen else None
        page.add_row(escape(row.peer), *_cells(race, row, chosen), style=style)
    return page


def _cells(race: Race, row: Row, chosen: Row | None) -> list[str]:
    """What stands under `COLUMNS`."""
    flops, moved = row.flops_per_second, row.bytes_per_second
    return [
        milliseconds(row.ms),
        f"{row.spread:.0%}",
        f"{flops / 1e9:,.3g}",
        _share(flops, race, MATMUL),
        f"{moved / 1e9:,.3g}",
        _share(moved, race, COPY),
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f}",
        "" if chosen is None or row is chosen else times(row.ms / chosen.ms),
        f"{max(row.errors.values(), default=math.nan):.1e}",
        f"{row.use:.2f}",
    ]


def _share(amount: float, race: Race, ceiling: str) -> str:
    return f"{amount / race.ceilings[ceiling].per_second:.2f}" if ceiling in race.ceilings else "-"


def milliseconds(ms: float) -> str:
    """Write a time with about three significant digits."""
    return f"{ms:,.{max(0, 2 - math.floor(math.log10(ms)))}f}"


def times(ratio: float) -> str:
    """Write a ratio: `3.1×`, or `0.42×` below one."""
    return f"{ratio:,.1f}×" if ratio >= 1 else f"{ratio:.2f}×"


def notes(race: Race) -> Iterator[str]:
    """Say how to read a race's table, and who is missing."""
    if race.ceilings:
        product, copy = race.ceilings[MATMUL], race.ceilings[COPY]
        yield (
            f"Ceilings, same rounds: {product.what} {product.per_second / 1e9:,.0f} GFLOP/s ± {product.spread:.0%}; "
            f"{copy.what} {copy.per_second / 1e9:,.0f} GB/s ± {copy.spread:.0%}. Clock: {race.clock}."
        )
    for row in race.timed:
        if row.configuration:
            yield f"{row.peer}: {row.configuration} ({row.source})"
    for row in race.timed:
        if row.definition != race.rows[0].definition:
            yield f"{row.peer} computes: {row.definition}"
    for row in race.rows:
        if row.status != "timed":
            yield f"{row.peer} {row.status}: {row.reason}"


LEGEND = (
    "Medians of interleaved rounds (two for the hopelessly slow), ± the interquartile range over the median. FLOP/s "
    "and GB/s count the visible pairs and the least traffic of what each contender computes; speed-up is that of the "
    "bold row over this one. Peak is the memory beyond the inputs (the allocator's count on CUDA; on a Linux CPU the "
    "rise of the resident set). Max error is the largest of output and gradients against the contender's own "
    "definition in float64, on sampled rows."
)


def warnings(record: Record) -> Iterator[str]:
    """Say why these times may mean little."""
    others = record.others
    if others > CORES and record.busy_ok:
        yield f"other processes used up to {others:.2f} of the CPU's cores during the races"
    elif others > CORES:
        yield f"other processes began to use the CPU, up to {others:.2f} cores"
    spread = max((row.spread or 0.0 for race in record.races for row in race.timed), default=0.0)
    if spread > UNSTEADY:
        yield f"a spread of {spread:.0%}: something else disturbs this machine"
    for race in record.races:
        for row in race.rows:
            if row.status == "refused" or (row.status == "failed" and row.ours):
                yield f"{race.case.name}, {race.passes}: {row.peer} {row.status}: {row.reason}"
