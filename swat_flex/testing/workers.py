"""`Search`: one plan searched by several processes, whose findings arrive as messages."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from swat_flex.problem import Backend
from swat_flex.testing.case import SwatCase
from swat_flex.testing.check import Verdict
from swat_flex.testing.fuzz import Failure, Plan, search, warm_up

START_SECONDS = 600.0  # a worker that has not compiled its programs by then is given up


@dataclass(frozen=True, slots=True)
class Warm:
    """A backend ran for the first time in a worker."""

    backend: Backend
    seconds: float


@dataclass(frozen=True, slots=True)
class Started:
    """Every worker is warm; the clock runs."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A case was checked; `kind` is the backend, and whether the case decodes or is cut into shards."""

    kind: str
    dtype: str
    verdict: Verdict

    @classmethod
    def of(cls, backend: Backend, case: SwatCase, verdict: Verdict) -> Passed:
        kind = " decode" if case.ring else " shards" if case.shards else ""
        return cls(backend + kind, case.dtype, verdict)


@dataclass(frozen=True, slots=True)
class Broken:
    """A worker ended on an error of its own."""

    text: str


Message = Warm | Started | Passed | Failure | Broken


def workers_for(device: str) -> int:
    """Processes to search with: one per core up to two on a CPU, one on a GPU."""
    if device != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2, cores)


class Search:
    """Searches while it is iterated over; leaving the `with` block ends the processes."""

    def __init__(self, plan: Plan, seconds: float, workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process may not use CUDA, nor torch's threads
        self._seconds = seconds
        self._inbox: Any = context.Queue()
        self._go, self._stop = context.Event(), context.Event()
        plans = [dataclasses.replace(plan, worker=n) for n in range(workers)]
        arguments = [(p, seconds, self._inbox, self._go, self._stop) for p in plans]
        self._processes = [context.Process(target=_work, args=a, daemon=True) for a in arguments]

    def __enter__(self) -> Search:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._go.set()
        for process in self._processes:
            process.join(timeout=1.0)
            if process.is_alive():
                process.terminate()
                process.join()
        self._inbox.close()

    def __iter__(self) -> Iterator[Message]:
        """Messages until all workers are done, or until the first failure."""
        warm = done = 0
        while done < len(self._processes):
            try:
                message = self._inbox.get(timeout=1.0)
            except queue.Empty:
                if not any(process.is_alive() for process in self._processes):
                    yield Broken("a worker ended without a word")
                    return
                continue
            if message == "warm":
                warm += 1
                if warm == len(self._processes):
                    self._go.set()
                    yield Started()
            elif message == "done":
                done += 1
            else:
                yield message
                if isinstance(message, (Failure, Broken)):
                    return


def _work(plan: Plan, seconds: float, outbox: Any, go: Any, stop: Any) -> None:
    """One process of a search."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if plan.device == "cpu":
        torch.set_num_threads(1)
    try:
        for backend, took in warm_up(plan):
            outbox.put(Warm(backend, took))
        outbox.put("warm")
        if not go.wait(START_SECONDS):
            return
        end = time.monotonic() + seconds

        def over() -> bool:
            return time.monotonic() > end or stop.is_set()

        failure = search(plan, lambda *passed: outbox.put(Passed.of(*passed)), over)
        outbox.put(failure or "done")
    except BaseException as error:
        outbox.put(Broken(f"{type(error).__name__}: {error}"))
        raise


def _end_with_parent() -> None:
    """Wait for the parent's end; what this process has to say then reaches nobody, and would keep it here forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # mypy: spawned processes have one
    parent.join()
    os._exit(1)
