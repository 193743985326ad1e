"""The record of an experiment as a table, as words and as a picture."""

from __future__ import annotations

import json
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

SCHEMA = 1
COLOURS = ("#595959", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True, slots=True)
class Record:
    """A finished experiment. machine: processor or GPU, versions, commit; text: what was trained on."""

    size: Size
    command: str
    machine: dict[str, str]
    text: dict[str, Any]
    runs: tuple[Run, ...]

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises ValueError for a file that is no such record."""
        try:
            values = json.loads(path.read_text())
            if values.pop("schema") != SCHEMA:
                raise KeyError("schema")
            values["size"] = Size(**values["size"])
            values["runs"] = tuple(run_of(run) for run in values["runs"])
            return cls(**values)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected a quality record of schema {SCHEMA}, got {error!r}") from error

    @property
    def lengths(self) -> list[int]:
        return sorted(self.runs[0].loss)

    @property
    def seeds(self) -> int:
        return len({run.seed for run in self.runs})

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
    return Run(**{**values, "loss": {int(length): bits for length, bits in values["loss"].items()}})


def rows_of(record: Record) -> list[list[str]]:
    """The table, its head first."""
    head = ["attention", *(f"{length:,} tokens" for length in record.lengths), "paper, Table 3"]
    body = [[name, *map(str, record.means(name)), f"{VARIANTS[name].paper:.4f}"] for name in record.variants]
    return [head, *body]


def sentences(record: Record) -> list[str]:
    """What holds here, at the longest rows and at those trained on."""
    shortest, longest = record.lengths[0], record.lengths[-1]
    return [
        f"{far.claim}: {far.outcome} at {longest:,} tokens, {near.outcome} at {shortest:,}. {far.better} is ahead of "
        f"{far.worse} by {far.gain} and {near.gain} bits per byte (paper: {far.paper:.4f} nats per token)."
        for far, near in zip(verdicts(record.runs, longest), verdicts(record.runs, shortest), strict=True)
    ]


def described(record: Record) -> str:
    """Honest about the size, in one paragraph."""
    size, run = record.size, record.runs[0]
    machine = ", ".join(record.machine.values())
    return (
        f"{run.parameters:,} parameters ({size.layers} layers, width {size.hidden}, 12 heads of {size.hidden // 12}), "
        f"{size.tokens:,} bytes of {record.text['name']} per run in rows of {size.length}, window {size.window} where "
        f"it slides, AdamW at {size.learning_rate}, {record.seeds} seeds. Bits per byte of {size.chunks} held-out "
        f"pieces of {record.lengths[-1]:,} bytes, cut into rows of each length: the predicted bytes are the same, only "
        f"how far a row reaches back differs. ± is a 95% interval over seeds. {machine}."
    )


def page(record: Record) -> str:
    """Heading, description, table, sentences and command, in Markdown."""
    head, *body = rows_of(record)
    lines = ["# The paper's comparison in the small", "", described(record), ""]
    lines += [*_bars([head, ["---", *["---:"] * (len(head) - 1)], *body]), ""]
    lines += [f"- {sentence}" for sentence in sentences(record)]
    return "\n".join([*lines, "", f"Made by `{record.command}`.", ""])


def _bars(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows]


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
    """Loss by row length beside loss by position; needs matplotlib (extra `plot`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    colours = dict(zip(record.variants, COLOURS, strict=False))
    _by_length(left, record, colours)
    _by_position(right, record, colours)
    figure.suptitle(f"{record.size.tokens:,} bytes, {record.seeds} seeds, 95% intervals; {record.machine['device']}")
    return figure


def _by_length(axes: Axes, record: Record, colours: dict[str, str]) -> None:
    names = record.variants[::-1]
    for at, name in enumerate(names):
        for step, mean in enumerate(record.means(name)):
            error = mean.half if record.seeds > 1 else None
            axes.errorbar(
                mean.value, at + 0.2 * (1 - step), xerr=error, fmt="o^s"[step], capsize=3, color=colours[name]
            )
    for step, length in enumerate(record.lengths):
        axes.plot([], [], "o^s"[step], color="0.3", label=f"{length:,} tokens")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("bits per byte of held-out text (lower is better)")
    axes.set_title("The same bytes, read in rows of three lengths", loc="left", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(title="row length", frameon=False)


def _by_position(axes: Axes, record: Record, colours: dict[str, str]) -> None:
    longest = record.lengths[-1]
    middle = [(i + 0.5) * longest / 16 for i in range(16)]
    for name in record.variants:
        means = [Mean.of(bits) for bits in zip(*(run.by_position for run in record.of(name)), strict=True)]
        axes.plot(middle, [mean.value for mean in means], color=colours[name], label=name)
    axes.axvline(record.size.length, color="0.4", linestyle=":", linewidth=1)
    axes.annotate(
        " trained to here", (record.size.length, 0.97), xycoords=("data", "axes fraction"), fontsize=8, color="0.3"
    )
    axes.set_xlabel(f"position in rows of {longest:,} tokens")
    axes.set_ylabel("bits per byte, mean over seeds")
    axes.set_title("By distance from the start of the row", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.12))
