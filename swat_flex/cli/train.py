"""`swat-flex train`: a byte-level model of any folder of text."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from swat_flex.cli import machine, options, screen
from swat_flex.nn import SwatConfig
from swat_flex.training import SIZES, Corpus, Progress, Trainer, TrainingConfig, load_checkpoint, parallel, read_corpus
from swat_flex.training.checkpoint import checkpoints

MINUTES = 10.0  # of a run that is told no end


def train(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder or file of text; without it Python's standard library.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints.")] = Path("swat_run"),
    size: Annotated[str, typer.Option(help=f"auto, {', '.join(SIZES)}.")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Steps to train.")] = None,
    minutes: Annotated[float | None, typer.Option(help=f"Minutes to train; {MINUTES:g} without --steps.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a step, over all processes.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and rows.")] = None,
    pattern: Annotated[str | None, typer.Option(help='File names to take, such as "*.md".')] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Less memory, more time.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile; by itself on a GPU.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    context_parallel: Annotated[
        int, typer.Option(help="Processes of torchrun that share the tokens of a row, for rows too long for one.")
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
) -> None:
    """Train a language model of bytes; Ctrl-C saves and stops, --resume goes on. Runs under torchrun too."""
    place = options.device(device)
    if size != "auto":
        options.one_of("--size", size, SIZES)
    given = {
        "length": length, "batch": batch, "learning_rate": learning_rate, "seed": seed, "eval_every": eval_every,
        "save_every": save_every, "gradient_checkpointing": gradient_checkpointing,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if steps is not None or minutes is not None:
        given |= {"steps": steps, "minutes": minutes}
    try:
        saved = _saved(out, resume)
        model, training = _configs(saved, size, place, given)
        corpus = _corpus(saved, folder, pattern)
        _run(model, training, corpus, out, place, compiled, saved, context_parallel)
    except (ValueError, OSError, FloatingPointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def _saved(out: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from; a run that does not go on must not mix with another."""
    if resume:
        return load_checkpoint(out)
    if checkpoints(out):
        raise ValueError(f"--out: expected a folder without checkpoints, or --resume to go on, got {str(out)!r}")
    return None


def _configs(
    saved: dict[str, Any] | None, size: str, place: torch.device, given: dict[str, Any]
) -> tuple[SwatConfig, TrainingConfig]:
    """Saved settings, else the size's; what is given goes before both.

    A size beside a saved model is compared with it in what it names; slopes and bias are as saved, by any version.
    """
    auto = "medium" if place.type == "cuda" else "small"
    chosen = SIZES[auto if size == "auto" else size]
    if saved is None:
        return chosen.model, TrainingConfig(**{"minutes": MINUTES, **chosen.training, **given})
    named = () if size == "auto" else ("hidden_size", "layers", "heads", "window")
    model = saved["model_config"] | {name: getattr(chosen.model, name) for name in named}
    return SwatConfig.from_dict(model), TrainingConfig(**{**saved["training_config"], **given})


def _corpus(saved: dict[str, Any] | None, folder: Path | None, pattern: str | None) -> Corpus:
    if saved is not None and folder is None and saved["corpus"]["folder"] is not None:
        folder = Path(saved["corpus"]["folder"])
    if pattern is None:
        pattern = "*" if saved is None else saved["corpus"]["pattern"]
    return read_corpus(folder, pattern)


def _run(
    model: SwatConfig,
    training: TrainingConfig,
    corpus: Corpus,
    out: Path,
    place: torch.device,
    compiled: bool | None,
    saved: dict[str, Any] | None,
    context: int,
) -> None:
    ranks = parallel.start(place, context)
    try:
        compiled = ranks.device.type == "cuda" if compiled is None else compiled
        trainer = Trainer(model, training, corpus, out, ranks=ranks, compiled=compiled)
        if saved is not None:
            trainer.resume(saved)
        page = _Screen(quiet=not ranks.first)
        with page.bar, _stopping(trainer):
            page.begin(trainer, corpus)
            trainer.run(page)
            page.end(trainer, out)
    finally:
        parallel.stop(ranks)


@contextmanager
def _stopping(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after its step; a second one ends the program."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: object) -> None:
        trainer.stop()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Screen:
    """A bar on a terminal's standard error; on standard output a line per evaluation."""

    def __init__(self, quiet: bool) -> None:
        self.console = screen.console()
        self.console.quiet = quiet
        columns = (BarColumn(), TextColumn("{task.percentage:.0f}%  {task.description}"), TimeElapsedColumn())
        self.bar = screen.bar(*columns, quiet=quiet)
        self.task = self.bar.add_task("", total=1.0)
        self.last: Progress | None = None

    def begin(self, trainer: Trainer, corpus: Corpus) -> None:
        count = sum(p.numel() for p in trainer.model.parameters())
        self.console.print(
            f"{count / 1e6:.2f}M parameters on {trainer.ranks.device} ({machine.describe(trainer.ranks.device)})"
        )
        train, held_out = len(corpus.train), len(corpus.held_out)
        self.console.print(f"{corpus.documents:,} documents: {train:,} bytes to train on, {held_out:,} held out")
        if trainer.step:
            self.console.print(f"Goes on from step {trainer.step:,}")

    def progress(self, progress: Progress) -> None:
        self.last = progress
        text = (
            f"step {progress.step:,}  {progress.bits:.3f} bits/byte  {progress.tokens_per_second:,.0f} tokens/s  "
            f"{_duration(progress.seconds_left)} left"
        )
        self.bar.update(self.task, completed=progress.share, description=text)

    def evaluated(self, step: int, bits_per_byte: float) -> None:
        line = f"step {step:>7,}  held-out {bits_per_byte:.3f} bits/byte"
        if self.last is not None:
            line += f"  training {self.last.bits:.3f}  {self.last.tokens_per_second:,.0f} tokens/s"
            line += f"  {_duration(self.last.seconds_left)} left"
        self.console.print(line)

    def saved(self, path: Path) -> None:
        self.bar.update(self.task, refresh=True)

    def end(self, trainer: Trainer, out: Path) -> None:
        self.console.print(f"{trainer.step:,} steps in {_duration(trainer.seconds)}; checkpoints in {out}")
        self.console.print(f"swat-flex generate {out} --prompt 'def '")


def _duration(seconds: float) -> str:
    """
    >>> _duration(192.4)
    '3:12'
    """
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02}"
