"""Cost against length, window and heads, and beyond the longest measured length by a straight line, labelled so."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich import box
from rich.table import Table

from perf.cases import Case, Definition, Passes
from perf.record import Race, Record

AXES = ("length", "window", "heads")
BEYOND = (131072, 262144, 524288, 1048576)


@dataclass(frozen=True)
class Point:
    """One cost: x is the length, the window or the number of heads; `measured` is False for an extrapolation."""

    x: int
    ms: float
    peak_bytes: int | None
    measured: bool


def x_of(case: Case) -> int:
    """What a case varies."""
    return {"length": case.q_len, "window": case.window, "heads": case.q_heads}[case.axis]


def series(record: Record, axis: str, passes: Passes) -> dict[str, list[Point]]:
    """Measured points by peer, in the order of x."""
    found: dict[str, list[Point]] = {}
    races = [race for race in record.races if race.case.axis == axis and race.passes == passes]
    for race in sorted(races, key=lambda race: x_of(race.case)):
        for row in race.timed:
            found.setdefault(row.peer, []).append(Point(x_of(race.case), row.ms, row.peak_bytes, True))
    return found


def extrapolate(points: list[Point], work: list[float], beyond: list[tuple[int, float]]) -> list[Point]:
    """Times beyond the measured ones, on the line through the last two in useful work.

    Args:
        points: measured, in the order of x.
        work: useful FLOPs of each.
        beyond: (x, useful FLOPs) wanted.

    A line through the longest two, not a fit: short lengths stay in caches that long ones leave. Never falling.
    """
    if len(points) < 2:
        return []
    (a, b), (wa, wb) = points[-2:], work[-2:]
    rate = max((b.ms - a.ms) / (wb - wa), 0.0)
    return [Point(x, b.ms + rate * (w - wb), None, False) for x, w in beyond if x > b.x]


def lengths(record: Record, passes: Passes) -> dict[str, list[Point]]:
    """Series against length, extrapolated to all that others were measured at and to `BEYOND`."""
    races = {x_of(race.case): race for race in record.races if race.case.axis == "length" and race.passes == passes}
    found = series(record, "length", passes)
    for peer, points in found.items():
        last = races[points[-1].x]
        work = [_work(races[point.x], peer) for point in points]
        beyond = [(n, _work_at(last, peer, n)) for n in (*sorted(races), *BEYOND)]
        points.extend(extrapolate(points, work, beyond))
    return found


def _work(race: Race, peer: str) -> float:
    row = race.row(peer)
    return row.flops if row else 0.0


def _work_at(race: Race, peer: str, length: int) -> float:
    """Useful FLOPs of a peer at another length: a window's grow with it, all earlier keys' with its square."""
    row = race.row(peer)
    causal = row is not None and "causal" in row.definition
    definition = Definition(None if causal else race.case.window)
    return definition.work(replace(race.case, q_len=length, kv_len=length), race.passes)[0]


def table(record: Record) -> Table:
    """Every axis on one page; extrapolated times carry a ~ and are no measurement."""
    page = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, title="Cost in ms; ~ extrapolated on the line through the "
        "two longest lengths in useful work, not measured", title_justify="left",
    )  # fmt: skip
    peers = list(dict.fromkeys(row.peer for race in record.races for row in race.timed))
    page.add_column("")
    for peer in peers:
        page.add_column(f"{peer}\nforward", justify="right")
        page.add_column("\nboth", justify="right")
    for axis in AXES:
        found = {p: lengths(record, p) if axis == "length" else series(record, axis, p) for p in ("forward", "both")}
        values = sorted({point.x for passes in found.values() for points in passes.values() for point in points})
        for x in values:
            cells = [_cell(found[p].get(peer, []), x) for peer in peers for p in ("forward", "both")]
            page.add_row(f"{axis} {x:,}", *cells, end_section=x == values[-1])
    return page


def _cell(points: list[Point], x: int) -> str:
    point = next((point for point in points if point.x == x), None)
    if point is None:
        return "-"
    mark = "" if point.measured else "~"
    return mark + (f"{point.ms:.3g}" if point.ms < 1000 else f"{point.ms:,.0f}")
