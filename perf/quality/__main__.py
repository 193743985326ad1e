"""`python -m perf.quality`: train every kind of attention on the same bytes, read long texts, say what holds."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from autotune.files import write_whole
from perf.quality import report, workers
from perf.quality.experiment import SIZES, VARIANTS, Run, Size
from perf.record import surroundings
from swat_flex.plot import save
from swat_flex.training import Corpus, read_corpus

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.command()
def main(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Models per kind of attention.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Processes of one thread each; 1 on a GPU.")] = 2,
    work: Annotated[Path, typer.Option(help="Finished runs; an interrupted experiment goes on.")] = Path(".quality"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record here.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw it here.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write it as a page of Markdown here.")] = None,
    show: Annotated[Path | None, typer.Option("--report", help="Train nothing: show this record.")] = None,
) -> None:
    """The paper's comparison in the small: bits per byte at 1, 4 and 16 times the training length."""
    if show is not None:
        record = report.Record.read(show)
    else:
        if size not in SIZES:
            raise typer.BadParameter(f"expected one of {', '.join(SIZES)}, got {size!r}", param_hint="--size")
        device = torch.device("cuda" if size == "gpu" else "cpu")
        if size == "gpu" and not torch.cuda.is_available():
            raise typer.BadParameter("expected a CUDA device for gpu, got none", param_hint="--size")
        corpus = read_corpus()
        runs = _experiment(SIZES[size], seeds, 1 if size == "gpu" else jobs, work, corpus, device)
        record = _record(size, seeds, jobs, runs, corpus, device)
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


def _experiment(size: Size, seeds: int, jobs: int, work: Path, corpus: Corpus, device: torch.device) -> tuple[Run, ...]:
    """Every run, those finished before read from `work`; seed by seed, so that an early stop leaves whole seeds."""
    key = sha256(json.dumps([asdict(size), corpus.fingerprint, report.SCHEMA]).encode()).hexdigest()[:12]
    folder = work / key
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        (name, seed): folder / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}.json"
        for seed in range(seeds)
        for name in VARIANTS
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("models", total=len(files))
        missing = [run for run, file in files.items() if not file.exists()]
        progress.update(task, completed=len(files) - len(missing))
        for run in workers.train_all(missing, size, jobs, device):
            write_whole(files[run.variant, run.seed], json.dumps(asdict(run)))
            last = run.loss[max(run.loss)]
            progress.update(task, advance=1, description=f"{run.variant}, seed {run.seed}: {last:.3f} bits per byte")
    return tuple(report.run_of(json.loads(file.read_text())) for file in files.values())


def _record(
    name: str, seeds: int, jobs: int, runs: tuple[Run, ...], corpus: Corpus, device: torch.device
) -> report.Record:
    around = surroundings(str(device))
    versions = ", ".join(f"{package} {version}" for package, version in around["versions"].items() if version)
    machine = {"device": around["device"].name, "versions": versions, "commit": f"commit {around['commit']}"}
    return report.Record(
        size=SIZES[name],
        command=f"python -m perf.quality --size {name} --seeds {seeds} --jobs {jobs}",
        machine=machine,
        text={
            "name": f"Python {platform.python_version()}'s standard library",
            "bytes": len(corpus.train) + len(corpus.held_out),
            "fingerprint": corpus.fingerprint,
        },
        runs=runs,
    )


if __name__ == "__main__":
    app(prog_name="python -m perf.quality")
