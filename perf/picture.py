"""A record as one picture. Drawing needs matplotlib (extra `plot`)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from perf.cases import PASSES as ORDER
from perf.cases import Passes
from perf.measure import COPY, MATMUL
from perf.record import Race, Record
from perf.report import milliseconds, units_of
from perf.scaling import Point, lengths, series
from swat_flex.plot import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "needs_matplotlib", "save"]

OURS, THEIRS, FAINT = "#0072B2", "#8c8c8c", "0.8"
COLOURS = {
    "swat cpp": OURS,
    "swat banded": "#56B4E9",
    "swat flex": "#009E73",
    "swat triton": "#CC79A7",
    "SDPA causal": "#595959",
    "FlexAttention softmax": "#D55E00",
    "local-attention": "#D55E00",
    "FlashAttention-2 window": "#E69F00",
}
PASSES = {"forward": "forward", "both": "forward + backward"}


def needs_matplotlib() -> None:
    """Raise before any work is done, not after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('--png: needs matplotlib, which is not installed; pip install "swat_flex[plot]"')


def draw(record: Record) -> Figure:
    """Scaling suites: time against length and window, memory against length, roofline. Others: times, roofline."""
    needs_matplotlib()
    figure = _scaling(record) if record.suite == "scaling" else _suite(record)
    versions = f"torch {record.versions['torch']}, commit {record.commit}, {record.created[:10]}"
    figure.suptitle(f"{record.device.name}, {units_of(record)}; {versions}; suite {record.suite}", fontsize=11)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _scaling(record: Record) -> Figure:
    figure = _figure(15, 10.5)
    axes = figure.subplots(2, 2)
    both: Passes = "both" if any(race.passes == "both" for race in record.races) else "forward"
    against_length = {(peer, p): points for p in ORDER for peer, points in lengths(record, p).items()}
    against_window = {(peer, p): points for p in ORDER for peer, points in series(record, "window", p).items()}
    memory = {
        (peer, both): [replace(p, ms=p.peak_bytes / 2**20) for p in points if p.peak_bytes]
        for peer, points in series(record, "length", both).items()
    }
    memory = {line: points for line, points in memory.items() if points}
    title = "Time against length, window 512; dotted: extrapolated, not measured"
    _lines(axes[0, 0], title, against_length, "length (tokens)", "ms")
    _lines(axes[0, 1], "Time against window", against_window, "window (keys)", "ms")
    title = f"Peak memory beyond the inputs, {PASSES[both]}, window 512"
    _lines(axes[1, 0], title, memory, "length (tokens)", "MiB")
    _roofline(axes[1, 1], [race for race in record.races if race.case.axis == "window"])
    return figure


def _lines(panel: Axes, title: str, found: dict[tuple[str, Passes], list[Point]], across: str, up: str) -> None:
    """One line per contender and pass; forward dashed, both solid; named at its end."""
    panel.set_title(title, loc="left", fontsize=10)
    labels = []
    for (peer, passes), points in found.items():
        colour, style = COLOURS.get(peer, THEIRS), "-" if passes == "both" else "--"
        measured = [p for p in points if p.measured]
        panel.plot([p.x for p in measured], [p.ms for p in measured], color=colour, linestyle=style, marker="o", ms=4)
        beyond = [measured[-1], *(p for p in points if not p.measured)]
        if len(beyond) > 1:
            panel.plot(
                [p.x for p in beyond], [p.ms for p in beyond], color=colour, linestyle=":", marker="o", mfc="white",
                markevery=slice(1, None), ms=4,  # the first point was measured
            )  # fmt: skip
        labels.append((beyond[-1].x, beyond[-1].ms, f"{peer}, {PASSES[passes]}", colour))
    panel.set(yscale="log", xlabel=across, ylabel=up)
    ticks = sorted({p.x for points in found.values() for p in points})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [_short(x) for x in ticks])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    _name_at_right(panel, labels)


def _short(n: int) -> str:
    """65,536 as 64k."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if n % size == 0:
            return f"{n // size}{unit}"
    return f"{n}"


def _name_at_right(panel: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Names in a column right of the panel, in the order of height, apart from each other, with leaders."""
    low, high = (math.log(y) for y in panel.get_ylim())
    step = 0.052
    order = sorted(labels, key=lambda label: label[1])
    heights = [(math.log(y) - low) / (high - low) for _, y, _, _ in order]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + step)
    over = max(0.0, heights[-1] - 1.0) if heights else 0.0
    heights = [height - over for height in heights]
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - step)
    for (x, y, text, colour), height in zip(order, heights, strict=True):
        leader = {"arrowstyle": "-", "lw": 0.5, "alpha": 0.6, "color": colour}
        panel.annotate(
            text, (x, y), (1.03, height), xycoords="data", textcoords="axes fraction", fontsize=8.5, color=colour,
            va="center", annotation_clip=False, arrowprops=leader,
        )  # fmt: skip


def _suite(record: Record) -> Figure:
    """Bars, a row per case and a column per pass; the roofline below."""
    cases = list(dict.fromkeys(race.case for race in record.races))
    passes = [p for p in ORDER if any(race.passes == p for race in record.races)]
    bars = [max((len(r.timed) for r in record.races if r.case == case), default=1) for case in cases]
    heights = [0.25 * max(n, 2) + 0.75 for n in bars]
    figure = _figure(14, sum(heights) + 5.2)
    subfigures: Any = figure.subfigures(2, 1, height_ratios=[sum(heights), 4.6])  # annotated as one
    top, bottom = subfigures
    axes = top.subplots(len(cases), len(passes), squeeze=False, height_ratios=heights)
    for i, case in enumerate(cases):
        for j, p in enumerate(passes):
            race = next((r for r in record.races if r.case == case and r.passes == p), None)
            _bars(axes[i, j], race, f"{case.name}, {PASSES[p]}: {case.sizes}")
    _roofline(bottom.subplots(1, 1), list(record.races))
    return figure


def _bars(panel: Axes, race: Race | None, title: str) -> None:
    panel.set_title(title, loc="left", fontsize=9)
    panel.spines[["top", "right", "bottom", "left"]].set_visible(False)
    panel.set_xticks([])
    rows = sorted(race.timed, key=lambda row: -row.ms) if race else []
    if not rows or race is None:
        panel.set_yticks([])
        panel.text(0, 0.5, "nobody was timed", transform=panel.transAxes, fontsize=8)
        return
    colours = [OURS if row.peer == race.chosen else "#7fb8d8" if row.ours else FAINT for row in rows]
    # Linear up to 20 times ours: a definition that takes 50 times as long would hide all the others.
    chosen = race.row(race.chosen)
    limit = 20 * (chosen.ms if chosen else min(row.ms for row in rows))
    shown = [min(row.ms, limit) for row in rows]
    panel.barh([row.peer for row in rows], shown, color=colours, height=0.72)
    for y, (row, width) in enumerate(zip(rows, shown, strict=True)):
        cut = " (bar cut)" if row.ms > limit else ""
        panel.text(width, y, f" {milliseconds(row.ms)} ms ±{row.spread:.0%}{cut}", va="center", fontsize=8)
    panel.set_xlim(0, max(shown) * 1.28)
    panel.tick_params(axis="y", length=0, labelsize=8)


def _roofline(panel: Axes, races: list[Race]) -> None:
    """Useful FLOP/s against useful FLOPs per byte, under the ceilings of the same run; ours by name."""
    races = [race for race in races if race.timed and race.ceilings]
    panel.set_title("Roofline: measured limits, and what each one reached", loc="left", fontsize=10)
    if not races:
        return
    every: list[tuple[float, float]] = []
    named: dict[str, list[tuple[float, float]]] = {}  # ours, forward first, by case
    for race in races:
        marker = "o" if race.passes == "forward" else "s"
        for row in race.timed:
            x, y = row.flops / row.bytes, row.flops_per_second / 1e9
            every.append((x, y))
            mine = row.peer == race.chosen
            panel.plot(x, y, marker, color=OURS if mine else FAINT, ms=11 if mine else 5, zorder=3 if mine else 2)
            if mine:
                name = f"W {race.case.window:,}" if race.case.axis == "window" else race.case.name
                named.setdefault(name, []).append((x, y))
    for number, points in enumerate(named.values(), 1):
        panel.plot(*zip(*points, strict=True), color=OURS, lw=0.8, alpha=0.6)
        for x, y in points:
            panel.text(x, y, f"{number}", color="white", fontsize=7, ha="center", va="center", zorder=4)
    key = "\n".join(f"{number}  {name}" for number, name in enumerate(named, 1))
    panel.text(1.02, 0.98, key, transform=panel.transAxes, fontsize=8.5, color=OURS, va="top", linespacing=1.6)
    # One roof for all: the best that the device did in any race.
    product = max((race.ceilings[MATMUL] for race in races), key=lambda ceiling: ceiling.per_second)
    copy = max((race.ceilings[COPY] for race in races), key=lambda ceiling: ceiling.per_second)
    left, right = min(x for x, _ in every) / 3, max(x for x, _ in every) * 3
    knee = product.per_second / copy.per_second
    xs = sorted({left, knee, right} if left < knee else {left, right})
    panel.plot(xs, [min(product.per_second, x * copy.per_second) / 1e9 for x in xs], color="black", lw=1.2)
    panel.set(xscale="log", yscale="log", xlabel="useful FLOPs per byte of least traffic", ylabel="useful GFLOP/s")
    panel.set_xlim(left, right)
    roof = product.per_second / 1e9
    panel.set_ylim(min(y for _, y in every) / 2, roof * 2.2)
    panel.text(right, roof * 1.06, f"{product.what}: {roof:,.0f} GFLOP/s", ha="right", fontsize=8, va="bottom")
    note = (
        f"slope: {copy.what}, {copy.per_second / 1e9:,.0f} GB/s\n"
        "● forward  ■ forward + backward\nblue: ours, joined; grey: others; visible pairs alone counted"
    )
    panel.text(0.99, 0.02, note, transform=panel.transAxes, ha="right", fontsize=8, va="bottom")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_formatter("")
        axis.set_major_formatter("{x:,g}")
