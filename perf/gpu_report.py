"""Everything that a GPU's committed record needs, within a time limit: check, tune, measure, keep."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perf import load
from perf.cases import GPU, Case
from perf.record import RESULTS, Record, save, slug, surroundings
from perf.suites import Suite, run_suite, suite

TESTS = 0.3  # shares of the limit
TUNING = 0.3
TUNED = ("SWAT 340M", "Mistral-7B", "gpt-oss")  # more would leave none of them enough time
DEVICE = "cuda:0"


class Stopped(RuntimeError):
    """The report cannot go on; nothing was measured or written."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: 0 is success; `tail` is the end of what it printed."""

    code: int
    tail: str


def _run_command(words: Sequence[str], seconds: float) -> Outcome:
    """Run a command from the repository's root, at most so long; 124 as `timeout` has it."""
    try:
        root = Path(__file__).parent.parent
        found = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False, cwd=root)
    except subprocess.TimeoutExpired:
        return Outcome(124, f"no end within {seconds:.0f} s")
    return Outcome(found.returncode, (found.stdout + found.stderr)[-4000:])


@dataclass(frozen=True)
class Tools:
    """What the report touches outside itself, so that a test can put something else in its place."""

    has_gpu: Callable[[], bool] = torch.cuda.is_available
    command: Callable[[Sequence[str], float], Outcome] = _run_command
    look: Callable[[str], load.Load] = load.look
    suite: Callable[[str, bool], Suite] = suite
    measure: Callable[..., Any] = run_suite
    surroundings: Callable[[str], dict[str, Any]] = surroundings
    now: Callable[[], float] = time.monotonic


def run(seconds: int, folder: Path | None, busy_ok: bool, tools: Tools | None = None) -> tuple[Record, Path]:
    """(record, its file): tests on the GPU, tuning, then the gpu and decode suites, all within `seconds`.

    A failed test ends the report. Failed tuning does not: the record tells which configuration each row ran with and
    where that came from. Cases for which no time is left are named in the record's steps.

    Raises:
        Stopped: no GPU, or its tests fail.
        load.Busy: others load the machine, and `busy_ok` is not given.
    """
    tools = tools or Tools()
    if not tools.has_gpu():
        raise Stopped(
            "gpu-report needs a CUDA device, and this machine has none; `python -m perf --suite cpu` needs none"
        )
    start = tools.now()
    before = tools.look("cuda")
    load.refuse_if_busy(before, busy_ok)
    steps = [_tested(tools, seconds * TESTS), *_tuned(tools, seconds * TUNING)]
    deadline = start + seconds - 20  # the last race's own length
    races: list[Any] = []
    for name in ("decode", "gpu"):  # the short one first
        found, left_out = tools.measure(tools.suite(name, False), False, deadline=deadline)
        races += found
        outcome = f"left out, the limit of {seconds} s had passed: {'; '.join(left_out)}" if left_out else "complete"
        steps.append({"name": f"suite {name}", "outcome": outcome})
    steps.append({"name": "all", "outcome": f"{tools.now() - start:.0f} s of {seconds} s"})
    record = Record(
        suite="gpu-report",
        quick=False,
        load_before={"cores": before.cores, "gpu_percent": before.gpu_percent},
        busy_ok=busy_ok,
        races=tuple(races),
        steps=tuple(steps),
        **tools.surroundings(DEVICE),
    )
    file = (folder or RESULTS) / f"{slug(record.device)}.json"
    save(record, file)
    return record, file


def _tested(tools: Tools, seconds: float) -> dict[str, str]:
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "tests"]
    found = tools.command(words, seconds)
    if found.code != 0:
        raise Stopped(f"the tests on the GPU fail, so nothing was measured (exit status {found.code}):\n{found.tail}")
    return {"name": "pytest -m gpu", "outcome": found.tail.strip().splitlines()[-1] if found.tail.strip() else "passed"}


def _tuned(tools: Tools, seconds: float) -> list[dict[str, str]]:
    """One step per tuned case and one for decoding, each with an equal share of the time."""
    wanted = {case.name: _tune_options(case) for case in GPU if case.name in TUNED}
    wanted["decode"] = ["--preset", "decode"]
    steps, share = [], seconds / len(wanted)
    for name, options in wanted.items():
        words = [sys.executable, "-m", "swat_flex", "tune", *options, "--seconds", f"{share:.0f}"]
        found = tools.command(words, share + 10)
        last = (found.tail.strip().splitlines() or [""])[-1]
        outcome = last if found.code == 0 else f"FAILED, exit status {found.code}: {last}"
        steps.append({"name": f"tune {name}", "outcome": outcome})
    return steps


def _tune_options(case: Case) -> list[str]:
    """`swat-flex tune`'s own words for a case."""
    shape = f"{case.batch},{case.q_heads},{case.kv_heads},{case.q_len},{case.head_dim}"
    return ["--shape", shape, "--window", str(case.window), "--dtype", "bf16", "--backward"]
