"""The record of an experiment as a table, as words and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from perf.quality.experiment import VARIANTS, Run, Size
from perf.quality.verdict import Mean, verdicts

SCHEMA = 1


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
        """Those that ran, in the paper's order."""
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
    """What holds here, at the longest rows."""
    longest = record.lengths[-1]
    return [
        f"{verdict.outcome}: {verdict.claim}. {verdict.better} against {verdict.worse}: {verdict.gain} bits per byte "
        f"ahead at {longest:,} tokens (paper: {verdict.paper:+.4f} nats per token)."
        for verdict in verdicts(record.runs, longest)
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


def markdown(record: Record) -> str:
    """Paragraph, table, sentences, command."""
    head, *body = rows_of(record)
    lines = [described(record), "", *_bars([head, ["---"] * len(head), *body]), ""]
    lines += [f"- {sentence}" for sentence in sentences(record)]
    return "\n".join([*lines, "", f"Made by `{record.command}`.", ""])


def _bars(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows]


def table(record: Record) -> Table:
    """For a terminal."""
    head, *body = rows_of(record)
    shown = Table(title="bits per byte of held-out text, by row length")
    for column in head:
        shown.add_column(column, justify="left" if column == "attention" else "right")
    for row in body:
        shown.add_row(*row)
    return shown


def draw(record: Record) -> Figure:
    """Loss by row length beside loss by position."""
    from matplotlib.figure import Figure

    colours = dict(zip(record.variants, COLOURS, strict=True))
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    for at, name in enumerate(reversed(record.variants)):
        for step, mean in enumerate(record.means(name)):
            marker, shade = "o^s"[step], (0.45, 0.7, 1.0)[step]
            left.errorbar(
                mean.value, at + 0.18 * (1 - step), xerr=mean.half if record.seeds > 1 else None, fmt=marker, capsize=3,
                color=colours[name], alpha=shade, label=f"{record.lengths[step]:,} tokens" if at == 0 else None,
            )  # fmt: skip
    left.set_yticks(range(len(record.variants)), list(reversed(record.variants)))
    left.set_xlabel("bits per byte of held-out text (lower is better)")
    left.set_title("The same bytes, read in rows of three lengths")
    left.grid(axis="x", alpha=0.3)
    legend = left.legend(title="row length", loc="best")
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_color"):
            handle.set_color("0.3")

    longest = record.lengths[-1]
    middle = [(i + 0.5) * longest / 16 for i in range(16)]
    for name in record.variants:
        curves = [Mean.of(values) for values in zip(*(run.by_position for run in record.of(name)), strict=True)]
        values = [curve.value for curve in curves]
        right.plot(middle, values, color=colours[name], linewidth=1.8, label=name)
        if record.seeds > 1:
            low, high = ([c.value + sign * c.half for c in curves] for sign in (-1, 1))
            right.fill_between(middle, low, high, color=colours[name], alpha=0.12, linewidth=0)
    right.axvline(record.size.length, color="0.4", linestyle=":", linewidth=1)
    right.annotate("trained to here", (record.size.length, 1), xycoords=("data", "axes fraction"), xytext=(4, -12),
                   textcoords="offset points", fontsize=8, color="0.3")  # fmt: skip
    right.set_xlabel(f"position in rows of {longest:,} tokens")
    right.set_ylabel("bits per byte")
    right.set_title("How far from the start of the row")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    return figure
