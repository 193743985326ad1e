"""`python -m perf.quality`: train every kind of attention on the same bytes, read long texts, say what holds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autotune.files import write_whole
from perf.quality import report, workers
from perf.quality.experiment import KINDS, SIZES, TEXTS, VARIANTS, Run, Size, Text
from perf.record import surroundings
from swat_flex.plot import save

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()
CHOOSING = 0  # the seed with which rates are chosen


@app.command()
def main(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "cpu",
    kinds: Annotated[str, typer.Option(help=f"{', '.join(KINDS)}, or names split by ';'.")] = "recipe",
    text: Annotated[str, typer.Option(help="code (Python's library) or prose (Vim's help).")] = "code",
    window: Annotated[int | None, typer.Option(min=2, help="Keys per query; None is the size's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training; None is the size's.")] = None,
    rates: Annotated[str | None, typer.Option(help="Peak learning rates to choose from, split by ','.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Models per kind of attention.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Processes of one thread each; 1 on a GPU.")] = 2,
    work: Annotated[Path, typer.Option(help="Finished runs; an interrupted experiment goes on.")] = Path(".quality"),
    finished: Annotated[bool, typer.Option("--finished", help="Train no more: report what is finished.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw it here.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write it as a page of Markdown here.")] = None,
    show: Annotated[Path | None, typer.Option("--report", help="Train nothing: show this record.")] = None,
) -> None:
    """The paper's comparison in the small: bits per byte at 1, 4 and 16 times the training length."""
    if show is not None:
        record = report.Record.read(show)
    else:
        chosen, names = _sized(size, window, steps, rates), _named(kinds)
        if text not in TEXTS:
            raise typer.BadParameter(f"expected one of {', '.join(TEXTS)}, got {text!r}", param_hint="--text")
        device = torch.device("cuda" if size == "gpu" else "cpu")
        if size == "gpu" and not torch.cuda.is_available():
            raise typer.BadParameter("expected a CUDA device for gpu, got none", param_hint="--size")
        one = _Experiment(chosen, names, seeds, 0 if finished else 1 if size == "gpu" else jobs, text, work, device)
        command = f"--size {size} --kinds '{kinds}' --text {text} --seeds {seeds}"
        for option, value in (("window", window), ("steps", steps), ("rates", rates)):
            command += "" if value is None else f" --{option} {value}"
        record = one.record(f"python -m perf.quality {command}")
    if json_file is not None:  # first: what took an hour is not lost to a broken pipe
        write_whole(json_file, record.to_json())
    console.print(report.table(record))
    console.print(report.described(record), highlight=False)
    for sentence in report.sentences(record):
        console.print(f"• {sentence}", highlight=False)
    if page is not None:
        write_whole(page, report.page(record))
    if png is not None:
        save(report.draw(record), png)


def _sized(size: str, window: int | None, steps: int | None, rates: str | None) -> Size:
    if size not in SIZES:
        raise typer.BadParameter(f"expected one of {', '.join(SIZES)}, got {size!r}", param_hint="--size")
    known = SIZES[size]
    return replace(
        known, window=window or known.window, steps=steps or known.steps, rates=_rates(rates) if rates else known.rates
    )


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(sorted({float(word) for word in text.split(",")}))
    except ValueError:
        rates = ()
    if not rates or rates[0] <= 0:
        raise typer.BadParameter(f"expected positive numbers (3e-3,6e-3), got {text!r}", param_hint="--rates")
    return rates


def _named(kinds: str) -> list[str]:
    names = [name for part in kinds.split(";") for name in KINDS.get(part, {part: None})]
    for name in names:
        if name not in VARIANTS:
            known = "; ".join((*KINDS, *VARIANTS))
            raise typer.BadParameter(f"expected any of {known}, got {name!r}", param_hint="--kinds")
    return list(dict.fromkeys(names))


class _Experiment:
    """Runs in files of their own, those finished before read and not trained again.

    First each kind with each rate at the seed CHOOSING, then each kind's best rate, seed by seed, so that an early stop
    leaves whole seeds. jobs 0 trains nothing.
    """

    def __init__(
        self, size: Size, names: list[str], seeds: int, jobs: int, text: str, work: Path, device: torch.device
    ) -> None:
        self.size, self.names, self.seeds, self.jobs, self.device = size, names, seeds, jobs, device
        self.kind_of_text, self.text = text, Text.of(text)
        # Rates are in the names of the files.
        key = json.dumps([asdict(replace(size, rates=())), self.text.corpus.fingerprint, report.SCHEMA])
        self.folder = work / sha256(key.encode()).hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)

    def record(self, command: str) -> report.Record:
        """Train what is missing and describe the whole.

        Raises:
            ValueError: no kind has been trained with all rates.
        """
        self._train([(name, rate, CHOOSING) for name in self.names for rate in self.size.rates])
        choice, best = {}, {}
        for name in self.names:
            tried = {rate: run for rate in self.size.rates if (run := self._run(name, rate, CHOOSING)) is not None}
            if len(tried) == len(self.size.rates):
                choice[name] = {rate: run.curve[max(run.curve)] for rate, run in tried.items()}
                best[name] = min(choice[name], key=choice[name].__getitem__)
        if not best:
            raise ValueError(f"runs: expected a kind that was trained with every rate, got none in {self.folder}")
        self._train([(name, rate, seed) for seed in range(self.seeds) for name, rate in best.items()])
        runs = [self._run(name, rate, seed) for name, rate in best.items() for seed in range(self.seeds)]
        return report.Record(
            size=self.size,
            command=command,
            machine=_machine(self.device),
            text={
                "name": self.text.name,
                "licence": self.text.licence,
                "bytes": len(self.text.corpus.train) + len(self.text.corpus.held_out) + len(self.text.reported),
                "fingerprint": self.text.corpus.fingerprint,
            },
            runs=tuple(run for run in runs if run is not None),
            choice=choice if len(self.size.rates) > 1 else {},
        )

    def _file(self, name: str, rate: float, seed: int) -> Path:
        return self.folder / f"{''.join(c if c.isalnum() else '-' for c in name)}-{rate:g}-{seed}.json"

    def _run(self, name: str, rate: float, seed: int) -> Run | None:
        file = self._file(name, rate, seed)
        return report.run_of(json.loads(file.read_text())) if file.exists() else None

    def _train(self, tasks: list[workers.Task]) -> None:
        missing = [task for task in tasks if not self._file(*task).exists()]
        if not missing or not self.jobs:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            shown = progress.add_task("models", total=len(tasks), completed=len(tasks) - len(missing))
            for run in workers.train_all(missing, self.size, self.kind_of_text, self.jobs, self.device):
                write_whole(self._file(run.variant, run.learning_rate, run.seed), json.dumps(asdict(run)))
                last = run.loss[max(run.loss)]
                told = f"{run.variant} at {run.learning_rate:g}, seed {run.seed}: {last:.3f} bits per byte"
                progress.update(shown, advance=1, description=told)


def _machine(device: torch.device) -> dict[str, str]:
    around = surroundings(str(device))
    versions = ", ".join(f"{package} {version}" for package, version in around["versions"].items() if version)
    return {"device": around["device"].name, "versions": versions, "commit": f"commit {around['commit']}"}


if __name__ == "__main__":
    app(prog_name="python -m perf.quality")
