"""Cost against length, window and heads, and beyond the longest measured length by a straight line, labelled so."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich import box
from rich.table import Column, Table

from perf.cases import PASSES, Case, Definition, Passes
from perf.record import Record

AXES = ("length", "window", "heads")
BEYOND = (131072, 262144, 524288, 1048576)


@dataclass(frozen=True)
class Point:
    """One cost: x is the length, the window or the number of heads; `measured` is False for an extrapolation."""

    x: int
    ms: float
    flops: float
    peak_bytes: int | None = None
    measured: bool = True


def x_of(case: Case) -> int:
    """What a case varies."""
    return {"length": case.q_len, "window": case.window, "heads": case.q_heads}[case.axis]


def series(record: Record, axis: str, passes: Passes) -> dict[str, list[Point]]:
    """Measured points by peer, in the order of x."""
    found: dict[str, list[Point]] = {}
    races = [race for race in record.races if race.case.axis == axis and race.passes == passes]
    for race in sorted(races, key=lambda race: x_of(race.case)):
        for row in race.timed:
            found.setdefault(row.peer, []).append(Point(x_of(race.case), row.ms, row.flops, row.peak_bytes))
    return found


def extrapolate(points: list[Point], beyond: list[tuple[int, float]]) -> list[Point]:
    """Times beyond the measured ones, on the line through the last two in useful work.

    A line through the longest two, not a fit: short lengths stay in caches that long ones leave. Never falling.

    Args:
        points: measured, in the order of x.
        beyond: (x, useful FLOPs) wanted.
    """
    if len(points) < 2:
        return []
    a, b = points[-2:]
    rate = max((b.ms - a.ms) / (b.flops - a.flops), 0.0)
    return [Point(x, b.ms + rate * (flops - b.flops), flops, measured=False) for x, flops in beyond if x > b.x]


def lengths(record: Record, passes: Passes) -> dict[str, list[Point]]:
    """Series against length, extrapolated to all that others were measured at and to `BEYOND`."""
    races = {x_of(race.case): race for race in record.races if race.case.axis == "length" and race.passes == passes}
    found = series(record, "length", passes)
    for peer, points in found.items():
        last = races[points[-1].x]
        # Useful FLOPs at other lengths: a window's grow with the length, all earlier keys' with its square.
        causal = any("causal" in row.definition for row in last.timed if row.peer == peer)
        definition = Definition(None if causal else last.case.window)
        cases = {n: replace(last.case, q_len=n, kv_len=n) for n in (*sorted(races), *BEYOND)}
        points.extend(extrapolate(points, [(n, definition.work(case, passes)[0]) for n, case in cases.items()]))
    return found


def table(record: Record) -> Table:
    """Every axis on one page; extrapolated times carry a ~ and are no measurement."""
    title = "Cost in ms; ~ extrapolated on the line through the two longest lengths in useful work, not measured"
    peers = list(dict.fromkeys(row.peer for race in record.races for row in race.timed))
    heads = [head for peer in peers for head in (f"{peer}\nforward", "\nboth")]
    columns = [Column(head, justify="right") for head in heads]
    page = Table("", *columns, box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for axis in AXES:
        found = {p: lengths(record, p) if axis == "length" else series(record, axis, p) for p in PASSES}
        values = sorted({point.x for passes in found.values() for points in passes.values() for point in points})
        for x in values:
            cells = [_cell(found[p].get(peer, []), x) for peer in peers for p in PASSES]
            page.add_row(f"{axis} {x:,}", *cells, end_section=x == values[-1])
    return page


def _cell(points: list[Point], x: int) -> str:
    point = next((point for point in points if point.x == x), None)
    if point is None:
        return "-"
    mark = "" if point.measured else "~"
    return mark + (f"{point.ms:.3g}" if point.ms < 1000 else f"{point.ms:,.0f}")
