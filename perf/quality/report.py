"""The record of an experiment as a table, as words and as a picture."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from perf.quality.experiment import VARIANTS, Run, Size
from perf.quality.verdict import Mean, verdicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEMA = 2
COLOURS = (
    "#595959", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#9467BD", "#BCBD22",
    "#17BECF", "#000000",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """What an experiment found.

    machine: processor or GPU, versions, commit; text: what was trained on.
    runs: each kind's at the best of its rates, the same for all its seeds.
    choice: bits per byte of the text for choosing, by kind and learning rate; empty where there was one rate.
    """

    size: Size
    command: str
    machine: dict[str, str]
    text: dict[str, Any]
    runs: tuple[Run, ...]
    choice: dict[str, dict[float, float]]

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises ValueError for a file that is no such record."""
        try:
            values = json.loads(path.read_text())
            if values.pop("schema") != SCHEMA:
                raise KeyError("schema")
            values["size"] = Size(**{**values["size"], "rates": tuple(values["size"]["rates"])})
            values["runs"] = tuple(run_of(run) for run in values["runs"])
            values["choice"] = {kind: _numbered(tried) for kind, tried in values["choice"].items()}
            return cls(**values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected a quality record of schema {SCHEMA}, got {error!r}") from error

    @property
    def lengths(self) -> list[int]:
        return sorted(self.runs[0].loss)

    @property
    def seeds(self) -> str:
        """How many models of each kind there are, "3" or "1 to 3"."""
        counts = sorted({len(self.of(name)) for name in self.variants})
        return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))

    def of(self, variant: str) -> list[Run]:
        return [run for run in self.runs if run.variant == variant]

    def means(self, variant: str) -> list[Mean]:
        """One per length."""
        return [Mean.of([run.loss[length] for run in self.of(variant)]) for length in self.lengths]

    @property
    def variants(self) -> list[str]:
        """List the variants that ran, in the paper's order."""
        return [name for name in VARIANTS if self.of(name)]


def run_of(values: dict[str, Any]) -> Run:
    """A run from JSON, whose keys are text."""
    by_number = {name: {int(key): bits for key, bits in values[name].items()} for name in ("loss", "curve")}
    return Run(**{**values, **by_number})


def _numbered(tried: dict[str, float]) -> dict[float, float]:
    return {float(rate): bits for rate, bits in tried.items()}


def rows_of(record: Record) -> list[list[str]]:
    """The table, its head first."""
    head = ["attention", *(f"{length:,} tokens" for length in record.lengths), "seeds", "rate", "paper, Table 3"]
    body = []
    for name in record.variants:
        paper, runs = VARIANTS[name].paper, record.of(name)
        cells = [name, *map(str, record.means(name)), str(len(runs)), f"{runs[0].learning_rate:g}"]
        body.append([*cells, "" if paper is None else f"{paper:.4f}"])
    return [head, *body]


def sentences(record: Record) -> list[str]:
    """What holds here, at the longest rows and at those trained on."""
    shortest, longest = record.lengths[0], record.lengths[-1]
    return [
        f"{far.claim}: {far.outcome} at {longest:,} tokens, {near.outcome} at {shortest:,}. {far.better} is ahead of "
        f"{far.worse} by {far.gain} and {near.gain} bits per byte"
        + ("." if far.paper is None else f" (paper: {far.paper:.4f} nats per token).")
        for far, near in zip(verdicts(record.runs, longest), verdicts(record.runs, shortest), strict=True)
    ]


def described(record: Record) -> str:
    """Honest about the size, in one paragraph."""
    size, text = record.size, record.text
    partial = " (partial: not every run has been made)" if " to " in record.seeds else ""
    counts = sorted({run.parameters for run in record.runs})
    parameters = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    return (
        f"{parameters} parameters ({size.layers} layers, width {size.hidden}, 12 heads of {size.hidden // 12}), "
        f"{size.tokens:,} bytes of {text['name']} ({text['licence']}) per run in rows of {size.length}, window "
        f"{size.window} where it slides, AdamW, {size.warmup} steps of warm-up, {record.seeds} seeds{partial}. "
        f"{_chosen(record)} "
        f"Bits per byte of {size.chunks} held-out pieces of {record.lengths[-1]:,} bytes, cut into rows of each "
        "length: the predicted bytes are the same, only how far a row reaches back differs. ± is a 95% interval "
        f"over seeds. {', '.join(record.machine.values())}."
    )


def _chosen(record: Record) -> str:
    if not record.choice:
        return f"All at a peak learning rate of {record.size.rates[0]:g}."
    rates = ", ".join(f"{rate:g}" for rate in record.size.rates)
    return (
        f"Each kind at the best of the peak learning rates {rates}, by seed 0 on held-out text apart from the report's."
    )


def choices(record: Record) -> list[list[str]]:
    """Bits per byte of the text for choosing by kind and learning rate, the head first."""
    rates = sorted({rate for tried in record.choice.values() for rate in tried})
    body = [
        [kind, *(f"{tried[rate]:.3f}" if rate in tried else "" for rate in rates)]
        for kind, tried in record.choice.items()
    ]
    return [["peak learning rate", *(f"{rate:g}" for rate in rates)], *body]


def page(record: Record) -> str:
    """Heading, description, tables, sentences and command, in Markdown."""
    lines = ["# The paper's comparison in the small", "", described(record), "", *_bars(rows_of(record)), ""]
    lines += [f"- {sentence}" for sentence in sentences(record)]
    if record.choice:
        lines += ["", "Where the rates come from, bits per byte of the text for choosing:", ""]
        lines += _bars(choices(record))
    return "\n".join([*lines, "", f"Made by `{record.command}`.", ""])


def _bars(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    shown = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return ["| " + " | ".join(row) + " |" for row in shown]


def table(record: Record) -> Table:
    """Make the table for a terminal."""
    head, *body = rows_of(record)
    shown = Table(title="bits per byte of held-out text, by row length")
    for column in head:
        shown.add_column(column, justify="left" if column == "attention" else "right")
    for row in body:
        shown.add_row(*row)
    return shown


def draw(record: Record) -> Figure:
    """Loss by row length, by steps trained and by position; needs matplotlib (extra `plot`)."""
    from matplotlib.figure import Figure

    has_curve = any(run.curve for run in record.runs)
    figure = Figure(figsize=(18 if has_curve else 13, 5.2), layout="constrained")
    left, *middle, right = figure.subplots(1, 2 + has_curve)
    colours = dict(zip(record.variants, COLOURS, strict=False))
    _by_length(left, record, colours)
    for axes in middle:
        _by_steps(axes, record, colours)
    _by_position(right, record, colours)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"{record.size.tokens:,} bytes, {record.seeds} seeds, 95% intervals; {record.machine['device']}")
    return figure


def _by_length(axes: Axes, record: Record, colours: dict[str, str]) -> None:
    names = record.variants[::-1]
    for at, name in enumerate(names):
        for step, mean in enumerate(record.means(name)):
            error = mean.half if math.isfinite(mean.half) else None
            axes.errorbar(
                mean.value, at + 0.2 * (1 - step), xerr=error, fmt="o^s"[step], capsize=3, color=colours[name]
            )
    for step, length in enumerate(record.lengths):
        axes.plot([], [], "o^s"[step], color="0.3", label=f"{length:,} tokens")
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 28, break_on_hyphens=False) for name in names])
    axes.set_xlabel("bits per byte of held-out text (lower is better)")
    axes.set_title("The same bytes, read in rows of three lengths", loc="left", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(title="row length", frameon=False)


def _by_steps(axes: Axes, record: Record, colours: dict[str, str]) -> None:
    for name in record.variants:
        curves = [run.curve for run in record.of(name) if run.curve]
        if curves:
            _band(axes, list(curves[0]), [list(curve.values()) for curve in curves], name, colours[name])
    axes.set_xlabel("steps trained")
    axes.set_ylabel("bits per byte of the text for choosing")
    axes.set_title("While it trains", loc="left", fontsize=10)
    axes.grid(alpha=0.3)


def _by_position(axes: Axes, record: Record, colours: dict[str, str]) -> None:
    longest = record.lengths[-1]
    middle = [(i + 0.5) * longest / 16 for i in range(16)]
    for name in record.variants:
        _band(axes, middle, [run.by_position for run in record.of(name)], name, colours[name])
    axes.axvline(record.size.length, color="0.4", linestyle=":", linewidth=1)
    axes.annotate(
        " trained to here", (record.size.length, 0.97), xycoords=("data", "axes fraction"), fontsize=8, color="0.3"
    )
    axes.set_xlabel(f"position in rows of {longest:,} tokens")
    axes.set_ylabel("bits per byte")
    axes.set_title("By distance from the start of the row", loc="left", fontsize=10)
    axes.grid(alpha=0.3)


def _band(axes: Axes, at: Sequence[float], lines: Sequence[Sequence[float]], name: str, colour: str) -> None:
    """The mean over seeds, and its interval where there are two seeds or more."""
    means = [Mean.of(values) for values in zip(*lines, strict=True)]
    axes.plot(at, [mean.value for mean in means], color=colour, label=name)
    if len(lines) > 1:
        low, high = ([mean.value + sign * mean.half for mean in means] for sign in (-1, 1))
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
