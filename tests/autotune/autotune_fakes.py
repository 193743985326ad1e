"""Scripted candidates that misbehave in many ways, and made-up entries. Without torch, so that workers start fast."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from autotune import Device, Entry, Key, LocalRunner, Rejected, Space, Store, Timing, Versions


@dataclass(frozen=True)
class Choice:
    name: str


def choices(*names: str) -> Space[Choice]:
    return Space(Choice, {"name": names})


@dataclass(frozen=True)
class Script:
    """One candidate: its samples in ms, again and again; what it does, and when.

    `does` may be any of the keys of `DEEDS`, or "lose" (the device), or "wrong" (numbers).
    """

    times: Sequence[float] = (1.0,)
    does: str = ""
    at: Literal["compile", "prepare", "run", "sample"] = "run"
    after: int = 0  # times that it does nothing yet
    file: Path | None = None  # for what it wants to tell the test


class FakeClock:
    name = "fake"

    def __init__(self) -> None:
        self.lost = False

    def sampler(self, run: Callable[[], object]) -> Callable[[], float]:
        assert isinstance(run, Candidate)
        return run.sample

    def probe(self) -> None:
        if self.lost:
            raise RuntimeError("the device answers no more")


@dataclass
class Candidate:
    task: "FakeTask"
    script: Script
    times: Iterator[float]

    def __call__(self) -> float:
        self.task.act(self.script, "run")
        return 2.0 if self.script.does == "wrong" else 1.0

    def sample(self) -> float:
        self.task.act(self.script, "sample")
        return next(self.times)


@dataclass
class FakeTask:
    scripts: Mapping[str, Script]
    clock: FakeClock = field(default_factory=FakeClock)
    calls: list[tuple[str, str]] = field(default_factory=list)

    def compile(self, config: Choice) -> None:
        self.calls.append(("compile", config.name))
        self.act(self.scripts[config.name], "compile")

    def prepare(self, config: Choice) -> Candidate:
        self.calls.append(("prepare", config.name))
        script = self.scripts[config.name]
        self.act(script, "prepare")
        return Candidate(self, script, itertools.cycle(script.times))

    def check(self, output: object) -> str | None:
        return None if output == 1.0 else f"{output} instead of 1.0"

    def act(self, script: Script, at: str) -> None:
        if not script.does or script.at != at:
            return
        self.calls.append((at, script.does))
        if self.calls.count((at, script.does)) <= script.after:
            return
        if script.does == "lose":
            self.clock.lost = True
            raise RuntimeError("an illegal memory access was encountered")
        if script.does in DEEDS:
            DEEDS[script.does](script)


def local(**scripts: Script) -> LocalRunner[Choice]:
    return LocalRunner(FakeTask(scripts))


def broken_factory(argument: object) -> FakeTask:
    raise LookupError(f"no task for {argument}")


def _raise(error: Exception) -> None:
    raise error


def _complain_and_exit(_: Script) -> None:
    print("terribly sorry", file=sys.stderr)
    os._exit(3)


def _hang(script: Script) -> None:
    if script.file:
        script.file.write_text(str(os.getpid()))
    time.sleep(600)


def _hang_with_child(script: Script) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert script.file
    script.file.write_text(str(child.pid))
    time.sleep(600)


DEEDS: dict[str, Callable[[Script], object]] = {
    "reject": lambda _: _raise(Rejected("spills 48 registers")),
    "raise": lambda _: _raise(RuntimeError("out of resources")),
    "quote": lambda _: _raise(RuntimeError("out of " + 9999 * "kernel " + "resources")),
    "err": lambda _: _raise(NameError("name 'warsp' is not defined")),
    "exit": _complain_and_exit,
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "interrupt": lambda _: signal.raise_signal(signal.SIGINT),
    "hang": _hang,
    "hang with child": _hang_with_child,
}

CPU = Device("cpu", "Fake CPU", "AVX2", 8)
GPU = Device("cuda", "Fake GPU", "9.0", 132)
VERSIONS = Versions("2.12.0", "3.6.0")
SPACE = choices("default", "fast", "faster")


def make_key(
    tunable: str = "matmul",
    schema: int = 1,
    source: str = "abc",
    bucket: Mapping[str, str | int | bool | None] | None = None,
    device: Device = CPU,
    versions: Versions = VERSIONS,
) -> Key:
    return Key(tunable, schema, source, {"size": 64} if bucket is None else bucket, device, versions)


def make_entry(
    key: Key | None = None, winner: str = "fast", winner_ms: float = 1.0, clock: str = "fake", day: int = 1
) -> Entry:
    timings = [({"name": "default"}, Timing(2.0, 0.1, 15)), ({"name": winner}, Timing(winner_ms, 0.1, 15))]
    created = datetime(2026, 1, day, tzinfo=UTC)
    return Entry(key or make_key(), {"name": winner}, {"name": "default"}, timings, [], clock, False, created)


def hammer(folder: Path, number: int, processes: int, times: int) -> None:
    """Write own and shared keys and read everybody's, from one of many processes."""
    warnings.simplefilter("error")
    chance = random.Random(number)
    for i in range(times):
        writer = Store(folder)
        assert writer.put(make_entry(make_key(bucket={"own": number, "i": i})))
        assert writer.put(make_entry(make_key(bucket={"shared": i % 10}), winner_ms=1.0 + number))
        reader = Store(folder)
        assert reader.lookup(make_key(bucket={"own": number, "i": i}), SPACE).origin == "user"
        assert reader.lookup(make_key(bucket={"shared": i % 10}), SPACE).origin == "user"
        reader.lookup(make_key(bucket={"own": chance.randrange(processes), "i": i}), SPACE)
