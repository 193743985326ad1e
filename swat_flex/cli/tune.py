"""`swat-flex tune`: measure what runs fastest here, and remember it for every process."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from swat_flex.cli import machine, options, screen

if TYPE_CHECKING:
    from autotune import Event
    from swat_flex.problem import Problem
    from swat_flex.tuning.plan import Planned
    from swat_flex.tuning.results import Outcome, Tuned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRESETS = ("train-7b", "decode", "paper-340m", "all")
BACKENDS = ("auto", "flex", "triton", "cpp", "banded")


def tune(
    shape: Annotated[
        list[str], typer.Option("--shape", help="B,Hq,Hkv,L,D: batch, query and key heads, tokens, head dimension.")
    ] = [],  # noqa: B006  (typer wants a list)
    window: Annotated[
        str, typer.Option("--window", help="Keys per query (512), left,right (512,0), or none for plain causal.")
    ] = "512",
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, bf16 or fp16; without it a preset keeps its own.")] = "",
    backward: Annotated[bool, typer.Option("--backward", help="Tune the backward too; train presets do.")] = False,
    seconds: Annotated[float, typer.Option("--seconds", help="For everything together.")] = 60.0,
    device: Annotated[str, typer.Option("--device", help="auto, or a device of this machine.")] = "auto",
    backend: Annotated[str, typer.Option("--backend", help="auto, flex, triton or banded.")] = "auto",
    preset: Annotated[str, typer.Option("--preset", help="A set of shapes: train-7b, decode, paper-340m or all.")] = "",
) -> None:
    """Measure what runs fastest on this machine and remember it: every process uses it from then on."""
    started = time.monotonic()
    options.one_of("--backend", backend, BACKENDS)
    if not seconds > 0:
        raise options.refused("--seconds", "a positive number", seconds)
    chosen = options.device(device)
    problems = _problems(shape, window, dtype, backward, chosen, preset)
    console = screen.console()
    console.print(f"{chosen}: {machine.describe(chosen)}")

    from swat_flex.tuning.plan import jobs_of, plan
    from swat_flex.tuning.search import run_searches

    jobs = []
    for problem, decode in problems:
        if not _fits(problem, console):
            continue
        try:
            jobs += jobs_of(problem, backend, seconds, decode=decode)
        except (ValueError, NotImplementedError) as error:
            raise typer.BadParameter(str(error), param_hint="--backend") from error
    planned = plan(jobs, seconds) if jobs else []
    _print_plan(planned, seconds, console)
    if all(item.refusal for item in planned):
        console.print("Nothing to tune here, for the reasons above.")
        raise typer.Exit(1)
    live = _Screen(console)
    with live.progress:
        tuned = run_searches(planned, seconds - (time.monotonic() - started), live.follow, live.finish)
    _print_results(tuned, console)
    if tuned.interrupted:
        raise typer.Exit(130)


def _problems(
    shapes: list[str], window: str, dtype: str, backward: bool, device: torch.device, preset: str
) -> list[tuple[Problem, bool]]:
    """Every problem that is asked for, and whether it is a step of decoding."""
    from swat_flex.tuning.shapes import SHAPE_SETS, self_attention

    if not shapes and not preset:
        raise typer.BadParameter("expected --shape B,Hq,Hkv,L,D or --preset, got neither", param_hint="--shape")
    if dtype:
        options.one_of("--dtype", dtype, DTYPES)
    side = options.window(window)
    given = DTYPES[dtype or "fp32"]
    problems = [(self_attention(_shape(text), side, given, device, backward), False) for text in shapes]
    if preset:
        options.one_of("--preset", preset, PRESETS)
        for name, cases in SHAPE_SETS.items():
            if preset in (name, "all"):
                own = DTYPES[dtype] if dtype else cases.dtype
                train = not cases.decode and (backward or cases.backward)
                queries = 1 if cases.decode else None
                found = (self_attention(sizes, w, own, device, train, queries) for sizes, w in cases.cases)
                problems += [(problem, cases.decode) for problem in found]
    return problems


def _shape(text: str) -> tuple[int, int, int, int, int]:
    if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*){4}", text):
        batch, q_heads, kv_heads, length, head_dim = map(int, text.split(","))
        if min(batch, q_heads, kv_heads, length, head_dim) >= 1 and q_heads % kv_heads == 0 and head_dim <= 256:
            return batch, q_heads, kv_heads, length, head_dim
    rule = "B,Hq,Hkv,L,D, each at least 1, Hq a multiple of Hkv, D at most 256 (1,8,8,4096,64)"
    raise options.refused("--shape", rule, text)


def _fits(problem: Problem, console: Console) -> bool:
    """Tell whether inputs, results and their copies find room; says so where they do not."""
    has = machine.memory(problem.device)
    needs = 4 * (problem.bytes() + (problem.bytes(backward=True) if problem.needs_grad else 0))
    if needs > has:
        console.print(f"left out: {problem} needs about {needs / 2**30:.0f} GiB, and there are {has / 2**30:.0f}")
    return needs <= has


def _print_plan(planned: list[Planned], seconds: float, console: Console) -> None:
    columns = [Column(name, justify="right") for name in ("candidates", "time")]
    table = Table("plan", "problem", *columns, box=None, pad_edge=False, header_style="bold")
    for item in planned:
        count = "-" if item.refusal else f"{item.candidates} of {item.size}"
        table.add_row(item.job.tunable, str(item.job.problem), count, "-" if item.refusal else f"{item.estimate:.0f} s")
    if planned:
        console.print(table)
    for item in planned:
        if item.refusal:
            console.print(f"left out: {item.job.tunable}, {item.job.problem}: {item.refusal}")
    estimate = sum(item.estimate for item in planned)
    console.print(f"about {estimate:.0f} s of {seconds:g} s; Ctrl-C keeps what was measured\n")


class _Screen:
    """The progress bar: a line per search, with the best time so far."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[best]}"), console=console)
        self._tasks: dict[int, TaskID] = {}

    def follow(self, item: Planned, event: Event[Any]) -> None:
        if id(item) not in self._tasks:
            self._tasks[id(item)] = self.progress.add_task(item.job.tunable, total=item.candidates, best="")
        task = self._tasks[id(item)]
        self.progress.update(task, completed=event.done, total=max(event.planned, event.done))
        if event.kind == "best" and event.timing is not None:
            self.progress.update(task, best=f"best {event.timing.median_ms:.4g} ms: {event.config}")

    def finish(self, outcome: Outcome) -> None:
        if outcome.result is not None and outcome.entry is None:  # what was left out, the plan has said
            self.progress.console.print(str(outcome))


def _print_results(tuned: Tuned, console: Console) -> None:
    columns = [Column(name, justify="right") for name in ("default ms", "winner ms", "speed-up")]
    table = Table("tuned", "problem", "winner", *columns, box=None, pad_edge=False, header_style="bold")
    for outcome in tuned.outcomes:
        if outcome.winner is None or outcome.result is None:
            continue
        default, winner = (
            "failed" if timing is None else f"{timing.median_ms:.4g} ±{timing.spread:.0%}"
            for timing in (outcome.default, outcome.winner)
        )
        speed = "?" if outcome.result.speedup is None else f"{outcome.result.speedup:.2f}x"
        table.add_row(outcome.name, outcome.shape, str(outcome.result.winner), default, winner, speed)
    console.print(table)
    console.print(f"\n{str(tuned).splitlines()[-1]}", soft_wrap=True)
    console.print("python -m autotune --app swat_flex list shows them all", soft_wrap=True)
