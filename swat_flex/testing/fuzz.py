"""`search`: draw cases, hold each backend against the definition, stop at the first that fails, shrunk. Extra `fuzz`.

Cases follow from the seed: each backend has a stream of rounds, each round a seed of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autotune.files import write_whole
from swat_flex.decode.attend import BACKENDS as DECODERS
from swat_flex.inspection import emulated
from swat_flex.problem import Backend
from swat_flex.testing.case import Kind, SwatCase
from swat_flex.testing.check import Verdict, check

ROUND = 20  # cases of one seed
DECODES = TAILS = 8  # of so many rounds one decodes, where the backend does, and one draws weights in σ's tail alone
SHARDS = 16  # of so many rounds one cuts sequences into shards
LONG = 64  # of so many rounds one draws `LONG_CASES` sequences of a thousand rows
LONG_CASES = 5
FIRST = 60  # cases that each backend gets before time is shared
SHRINKS = 400  # attempts to make a failing case smaller,
EMULATED_SHRINKS = 60  # and where each may compile a kernel and takes seconds
FAMILY_SECONDS = 60.0  # between two compilations of `flex`


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that a backend gets wrong, and what was said about it."""

    case: SwatCase
    backend: Backend
    device: str
    text: str
    emulate: str | None = None  # see Plan

    def reproducer(self) -> str:
        """Three lines of Python that fail the same way."""
        lines = ["from swat_flex.testing.case import SwatCase", "from swat_flex.testing.check import check"]
        call = f"check({self.case!r}, {self.backend!r}, {self.device!r})"
        if self.emulate is not None:
            lines.insert(0, "from swat_flex.inspection import emulated")
            call = f"with emulated({self.emulate!r}): {call}"
        return "\n".join([*lines, call])

    def save(self, path: Path) -> None:
        """Write the file that `load` reads; whole or not at all."""
        record = {
            "case": self.case.to_json(),
            "backend": self.backend,
            "device": self.device,
            "failure": self.text,
            "emulate": self.emulate,
            "reproducer": self.reproducer().splitlines(),
            "torch": torch.__version__,
        }
        write_whole(path, json.dumps(record, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Failure:
        """What `save` wrote; ValueError if it is something else."""
        try:
            record = json.loads(path.read_text())
            case = SwatCase.from_json(record["case"])
            return cls(case, record["backend"], record["device"], record["failure"], record.get("emulate"))
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a file that `swat-flex fuzz` wrote, got {error!r}") from error


@dataclass(frozen=True, slots=True)
class Plan:
    """What to search; `worker` tells apart processes that share a plan, `emulate` names a GPU whose code a CPU runs."""

    backends: tuple[Backend, ...]
    device: str = "cpu"
    dtypes: tuple[str, ...] | None = None
    seed: int = 0
    worker: int = 0
    emulate: str | None = None


@dataclass(slots=True)
class _Stream:
    """One backend's share of the search."""

    backend: Backend
    rounds: int = 0
    cases: int = 0
    seconds: float = 0.0
    compiled: float = 0.0  # when the family of programs was compiled
    family: int = 0
    seen: set[SwatCase] = field(default_factory=set)  # each round of hypothesis begins with the same smallest case


Record = Callable[[Backend, SwatCase, Verdict], None]


def warm_up(plan: Plan) -> Iterator[tuple[Backend, float]]:
    """Run each backend once, so that no time of the search goes into imports and compilations; seconds of each."""
    for backend in plan.backends:
        begin = time.monotonic()
        _round(plan, _Stream(backend, family=plan.worker + plan.seed), 1, lambda *_: None, lambda: False)
        yield backend, time.monotonic() - begin


def search(plan: Plan, record: Record, over: Callable[[], bool]) -> Failure | None:
    """Draw cases until `over()`; the first failure, shrunk, or None. `record` hears of every case that passed."""
    streams = [_Stream(b, family=plan.worker + plan.seed, compiled=time.monotonic()) for b in plan.backends]
    while not over():
        hungry = [stream for stream in streams if stream.cases < FIRST]
        stream = min(hungry, key=lambda s: s.cases) if hungry else min(streams, key=lambda s: s.seconds)
        begin = time.monotonic()
        if begin - stream.compiled > FAMILY_SECONDS:
            stream.family, stream.compiled = stream.family + 1, begin
        stream.rounds += 1
        if failure := _round(plan, stream, ROUND, record, over):
            return failure
        stream.cases += ROUND
        stream.seconds += time.monotonic() - begin
    return None


def _round(plan: Plan, stream: _Stream, count: int, record: Record, over: Callable[[], bool]) -> Failure | None:
    """One run of hypothesis: its first failure, shrunk."""
    import hypothesis

    backend = stream.backend
    found: Failure | None = None
    attempts = 0
    most = SHRINKS if plan.emulate is None else EMULATED_SHRINKS

    def attempt(case: SwatCase) -> None:
        nonlocal found, attempts
        if found is None and (over() or case in stream.seen):
            return
        stream.seen.add(case)
        attempts += found is not None
        if found is not None and attempts > most and case != found.case:
            return  # the smallest so far must go on failing, or hypothesis calls it flaky
        try:
            with _running(plan.emulate):
                verdict = check(case, backend, plan.device)
        except Exception as error:
            found = Failure(case, backend, plan.device, _words(error), plan.emulate)
            raise
        if found is None:
            record(backend, case, verdict)

    seed = zlib.crc32(f"{plan.seed} {plan.worker} {backend} {stream.rounds}".encode())
    kind = _kind(plan, backend, stream.rounds)
    strategy = cases(plan, backend, stream.family, kind)
    settings = hypothesis.settings(
        max_examples=LONG_CASES if kind == "long" else count, deadline=None, database=None, report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck), verbosity=hypothesis.Verbosity.quiet,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's of infinities, in Triton's interpreter
        try:
            hypothesis.seed(seed)(settings(hypothesis.given(case=strategy)(attempt)))()
        except Exception:
            if found is None:
                raise
    return found


def _kind(plan: Plan, backend: Backend, number: int) -> Kind:
    """What a round draws."""
    if backend == "flex" or plan.emulate is not None:  # each size would be compiled
        return "usual"
    if number % DECODES == DECODES - 1 and backend in DECODERS:
        return "decode"
    if number % TAILS == TAILS // 2:
        return "tails"
    if number % SHARDS == SHARDS // 2 + 1:
        return "shards"
    slow = backend == "naive" or (backend == "triton" and plan.device == "cpu")
    return "long" if number % LONG == LONG // 4 + 1 and not slow else "usual"


def cases(plan: Plan, backend: Backend, family: int | None = None, kind: Kind = "usual") -> Any:
    """The strategy that a plan draws from; ValueError if the backend has none of the dtypes."""
    from swat_flex.testing.strategies import cases_for

    with _running(plan.emulate):
        return cases_for(backend, plan.device, plan.dtypes, family, kind)


def replay(failure: Failure) -> Failure | None:
    """Run the case again: how it fails now, or None if it passes."""
    try:
        with _running(failure.emulate):
            check(failure.case, failure.backend, failure.device)
    except Exception as error:
        return dataclasses.replace(failure, text=_words(error))
    return None


def _running(emulate: str | None) -> AbstractContextManager[object]:
    """Let backend `triton` run code compiled for a GPU that is not here, or change nothing."""
    return contextlib.nullcontext() if emulate is None else emulated(emulate)


def _words(error: Exception) -> str:
    if isinstance(error, AssertionError):
        return str(error)
    return "".join(traceback.format_exception_only(error)).strip()


def available(device: str, emulate: str | None = None) -> dict[Backend, str | None]:
    """Each backend, and why it does not run on the device here, or None."""
    if emulate is not None:
        return {"triton": None}
    names: tuple[Backend, ...] = ("cpp", "banded", "naive", "flex", "triton")
    return {name: SwatCase(1, 1).refusal(name, device, gradients=False) for name in names}
