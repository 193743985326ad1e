"""Everything that a GPU's record needs, as steps that each end within their share and lose nothing that was measured.

Each step is a command in a process group of its own. What it prints is read line by line, and every result among it is
appended to `report.jsonl` and synchronised at once. A step that crashes, hangs or fails costs itself alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from perf.cases import GPU_REPORT, Case, Passes
from perf.record import SCHEMA, Record, save, slug

ROOT = Path(__file__).parent.parent
LINES, LOG = "report.jsonl", "report.log"
TUNING_SECONDS = 300.0  # a search with less finds nothing
TEST_PROCESSES = 4  # what the memory of one GPU holds
GPU_TESTS = ("tests/gpu", "tests/perf/test_perf_peers.py")  # where tests are marked gpu or sanitizer

Row = dict[str, Any]
Parse = Callable[[str], Row | None]


def json_row(line: str) -> Row | None:
    """Read a result that one of our own steps printed."""
    try:
        found = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


_TEST = re.compile(r"(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) )?(?P<test>tests/.+?)(?: (?P<last>[A-Z]{4,})\b.*)?")


def test_row(line: str) -> Row | None:
    """Read what `pytest -v` says of one test, alone or as one of several processes."""
    found = _TEST.fullmatch(line.rstrip())
    outcome = found and (found["first"] or found["last"])
    if not found or not outcome:
        return None
    return {"test": found["test"].partition("@")[0], "outcome": outcome.lower()}  # @ and the test's group


def text_row(line: str) -> Row | None:
    """Keep a line as it is."""
    return {"text": line.rstrip()} if line.strip() else None


@dataclass(frozen=True)
class Step:
    """A part of the report.

    Attributes:
        words: its command; "{seconds}" stands for what its share turns out to be.
        seconds: its share, relative to the other steps' and to what the steps before it left over.
        parse: finds a result in a line of its output.
        least: seconds below which it is left out.
    """

    name: str
    words: tuple[str, ...]
    seconds: float
    parse: Parse = json_row
    least: float = 0.0


def plan(dry: bool = False) -> list[Step]:
    """List the steps in the order of what is learnt from them; `dry` runs them on a CPU, on cases for ants."""
    flags = ("--dry-run",) if dry else ()

    def ours(name: str, seconds: float, *words: str) -> Step:
        return Step(name, (sys.executable, "-m", "perf", "gpu-step", *words, *flags), seconds)

    def race(case: Case, passes: Passes) -> Step:
        words = ("race", case.name, passes, "--seconds", "{seconds}")
        return ours(f"race, {case.name}, {passes}", 30 if case.decodes else 60, *words)

    def tests(name: str, seconds: float, mark: str, words: str) -> Step:
        several = importlib.util.find_spec("xdist") is not None and not dry
        parallel = ("-n", str(TEST_PROCESSES), "--dist", "loadgroup") if several else ()
        command = (sys.executable, "-m", "pytest", "-v", "--tb=short", *parallel, "-m", mark, "-k", words, *GPU_TESTS)
        return Step(name, command, seconds, test_row)

    case = GPU_REPORT[0]
    shape = f"{case.batch},{case.q_heads},{case.kv_heads},{case.q_len},{case.head_dim}"
    tuned = f"--shape {shape} --window {case.window} --dtype bf16 --backward --backend triton"
    if dry:
        tuned = "--shape 1,2,2,64,16 --window 16"
    seconds = "1" if dry else f"{TUNING_SECONDS:.0f}"
    tuning = (sys.executable, "-m", "swat_flex", "tune", *tuned.split(), "--seconds", seconds)
    steps = [
        ours("versions", 20, "versions"),
        *(ours(f"first calls, {name}", 40, "first", name) for name in ("triton", "flex", "decode")),
        tests("tests, bfloat16", 240, "gpu", "bfloat16 or not (float16 or float32)"),
        *(race(case, passes) for case in GPU_REPORT for passes in case.passes),
        ours("ncu", 60, "ncu"),
        tests("tests, other dtypes", 150, "gpu", "not bfloat16 and (float16 or float32)"),
        tests("tests, sanitizer", 100, "sanitizer", "sanitizer"),
        Step("tuning", tuning, TUNING_SECONDS + 30, text_row, 0.0 if dry else TUNING_SECONDS),
        Step("emulation", (sys.executable, "-m", "perf.emulated", *flags), 60),  # its time is the CPU's
    ]
    # On a CPU a race compiles FlexAttention for longer than all tests take, which skip.
    return [replace(step, seconds=1.0) for step in steps] if dry else steps


def run(steps: Sequence[Step], folder: Path, seconds: float, now: Callable[[], float] = time.monotonic) -> list[Row]:
    """Run the steps in turn; what one leaves of its share goes to those after it.

    Args:
        folder: receives `report.jsonl`, appended to where it exists, and `report.log`, all that the steps printed.
        seconds: for everything together.
        now: seconds, monotonic.

    Returns:
        Every row, as in the file: results with the name of their step, and how each step ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start, rows = now(), list[Row]()
    with open(folder / LINES, "a", encoding="utf-8") as lines, open(folder / LOG, "a", encoding="utf-8") as log:

        def keep(row: Row) -> None:
            rows.append(row)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            os.fsync(lines.fileno())

        for i, step in enumerate(steps):
            share = (start + seconds - now()) * step.seconds / sum(later.seconds for later in steps[i:])
            began = now()
            if share <= step.least:
                ended = f"left out: needs {step.least:.0f} s, and {max(share, 0.0):.0f} s are left for it"
            else:
                ended = _follow(step, share, keep, log)
            keep({"step": step.name, "ended": ended, "seconds": round(now() - began, 1)})
            print(f"{now() - start:5.0f} s  {step.name}: {ended}", flush=True)
    return rows


def _follow(step: Step, seconds: float, keep: Callable[[Row], object], log: TextIO) -> str:
    """Run one step and keep its rows as they come; how it ended."""
    log.write(f"\n== {step.name}: {' '.join(step.words)}\n")
    words = [word.replace("{seconds}", f"{seconds:.0f}") for word in step.words]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT,
        start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    late = threading.Event()

    def cut() -> None:
        late.set()
        _kill(process)

    timer = threading.Timer(seconds, cut)
    timer.start()
    last = ""
    try:
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            if row := step.parse(line):
                keep({"step": step.name, **row})
            last = line.strip() or last
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # until it is waited for, its number is its own
    finally:
        timer.cancel()
        _kill(process)
        code = process.wait()
    if late.is_set():
        return f"cut after {seconds:.0f} s"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return "complete" if code == 0 else f"exit status {code}: {last[-300:]}"


def _kill(process: subprocess.Popen[str]) -> None:
    """End a step and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_lines(file: Path) -> list[Row]:
    """Read the rows of a `report.jsonl`; a last line that was torn is passed over."""
    return [row for line in file.read_text(encoding="utf-8").splitlines() if (row := json_row(line))]


def assemble(rows: Sequence[Row]) -> Record:
    """Make a record of the rows of one device: its races, how each step ended, and which tests failed.

    Raises:
        ValueError: no row tells versions and device.
    """
    about = next((row["surroundings"] for row in rows if "surroundings" in row), None)
    if about is None:
        raise ValueError(f"rows: expected one with versions and device, got none among {len(rows)}")
    races = {(race["case"]["name"], race["passes"]): race for row in rows if (race := row.get("race"))}
    steps = [{"name": row["step"], "outcome": row["ended"]} for row in rows if "ended" in row]
    failed = dict.fromkeys(row["test"] for row in rows if row.get("outcome") in ("failed", "error"))
    results = {"races": list(races.values()), "steps": steps, "failed_tests": list(failed)}
    return Record.parse({"schema": SCHEMA, "suite": "gpu-report", "quick": False, **about, **results})


def write_record(folder: Path) -> Path:
    """Write `<device>.json` beside a `report.jsonl`; where it is."""
    record = assemble(read_lines(folder / LINES))
    file = folder / f"{slug(record.device)}.json"
    save(record, file)
    return file
