"""Run candidates in worker processes, so that a crash, a poisoned device or a hang costs one candidate."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Generic

from autotune.runner import CandidateFailed, Failure, TaskError, shorten
from autotune.serve import serve
from autotune.space import Config

STDERR_LINES = 5


class WorkerRunner(Generic[Config]):
    """Runs candidates in processes of their own; use as a context manager, which ends them.

    All processes compile side by side; only the first one measures, and nobody compiles meanwhile. A process that
    dies or hangs is replaced when next needed, and candidates it had admitted are admitted anew.

    Processes are spawned, so a script that uses this needs the usual `if __name__ == "__main__":` guard.

    Args:
        factory: "module:function", importable in a fresh process; called with `argument`, it builds the Task.
        argument: anything that can be pickled.
        timeout: seconds that one step of a candidate (compilation, admission, sample) may take.
        start_timeout: seconds that a process may take to start and build the task.

    Raises:
        ValueError: `factory` or a number is out of range.
        TaskError: on first use, when the task could not be built; later, when it raised a programming error.
    """

    def __init__(
        self,
        factory: str,
        argument: object = None,
        *,
        workers: int = 1,
        timeout: float = 120.0,
        start_timeout: float = 300.0,
    ) -> None:
        if factory.count(":") != 1:
            raise ValueError(f"factory: expected 'module:function', got {factory!r}")
        for name, number in {"workers": workers, "timeout": timeout, "start_timeout": start_timeout}.items():
            if number <= 0:
                raise ValueError(f"{name}: expected a number above 0, got {number}")
        self.batch = workers if workers == 1 else 2 * workers  # keeps all busy when compile times differ
        self._workers = workers
        self._task = (factory, argument)
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._logs = Path(tempfile.mkdtemp(prefix="autotune-"))
        self._pool: dict[int, _Worker] = {}
        # Not daemons, which may start no processes of their own (compilers do); this ends them at exit instead.
        self._end = weakref.finalize(self, _clean_up, self._pool, self._logs)

    def __enter__(self) -> "WorkerRunner[Config]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the processes and remove their captured output."""
        self._end()

    @property
    def clock(self) -> str:
        return self._ready(0).clock

    def compile(self, configs: Sequence[Config]) -> dict[Config, Failure]:
        failures: dict[Config, Failure] = {}
        queue = deque(configs)
        idle = list(range(min(self._workers, len(configs))))
        busy: dict[int, Config] = {}
        try:
            for slot in idle:
                self._start(slot)  # all at once, then wait for each
            while queue or busy:
                while queue and idle:
                    slot, config = idle.pop(), queue.popleft()
                    self._ready(slot).send("compile", config, self._timeout)
                    busy[slot] = config
                for slot in self._next_answers(list(busy)):
                    idle.append(slot)
                    config = busy.pop(slot)
                    try:
                        failures.update(self._answer(slot))
                    except CandidateFailed as failed:
                        failures[config] = failed.failure
        except BaseException:
            _kill_all(self._pool)  # answers are due that nobody will read
            raise
        return failures

    def admit(self, config: Config) -> float:
        return self._ask("admit", config)

    def sample(self, config: Config) -> float:
        return self._ask("sample", config)

    def _ask(self, verb: str, config: Config) -> float:
        try:
            self._ready(0).send(verb, config, self._timeout)
            milliseconds: float = self._answer(0)
            return milliseconds
        except CandidateFailed:
            raise
        except BaseException:
            self._kill(0)  # its answer is due and nobody will read it
            raise

    def _start(self, slot: int) -> "_Worker":
        if not self._end.alive:
            raise ValueError("runner: expected an open one, got one that was closed")
        if slot not in self._pool:
            self._pool[slot] = _Worker(*self._task, self._logs / f"{slot}.log", self._start_timeout)
        return self._pool[slot]

    def _ready(self, slot: int) -> "_Worker":
        worker = self._start(slot)
        if not worker.ready:
            try:
                worker.clock = self._answer(slot)
                worker.ready = True
            except CandidateFailed as failed:
                raise TaskError(f"the worker for {self._task[0]!r} did not start: {failed}") from failed
        return worker

    def _next_answers(self, slots: Sequence[int]) -> list[int]:
        """Waits; the slots whose worker has answered, has died or is out of time."""
        workers = {slot: self._pool[slot] for slot in slots}
        first = min(worker.deadline for worker in workers.values())
        answered = wait([worker.connection for worker in workers.values()], max(0.0, first - time.monotonic()))
        now = time.monotonic()
        return [slot for slot, worker in workers.items() if worker.connection in answered or worker.deadline <= now]

    def _answer(self, slot: int) -> Any:
        """The answer to what was sent; a worker that gives none, or lost its device, is killed."""
        try:
            status, value = self._pool[slot].receive()
        except CandidateFailed:
            self._kill(slot)
            raise
        if status == "failed":
            raise CandidateFailed(value)
        if status == "lost":
            self._kill(slot)
            raise CandidateFailed(Failure("crash", value))
        if status == "mistake":
            self._kill(slot)
            raise TaskError(f"the task of {self._task[0]!r} failed, and no candidate is to blame\n{value}")
        return value

    def _kill(self, slot: int) -> None:
        if slot in self._pool:
            self._pool.pop(slot).kill()


class _Worker:
    """One spawned process and the pipe to it; `ready` once it has told the task's `clock`."""

    def __init__(self, factory: str, argument: object, log: Path, start_timeout: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.ready, self.clock = False, ""
        self._log = log
        log.touch()
        self._expect_within(start_timeout)
        self._process = context.Process(
            target=serve, args=(theirs, factory, argument, log), name=f"autotune {log.stem}", daemon=False
        )
        self._process.start()
        theirs.close()  # else the end of the process would not end the pipe

    def send(self, verb: str, config: object, timeout: float) -> None:
        self._expect_within(timeout)
        with contextlib.suppress(OSError):  # it died since its last answer: receive() finds that out
            self.connection.send((verb, config))

    def receive(self) -> tuple[str, Any]:
        """Status and value of the answer; raises CandidateFailed (timeout or crash) and ends the process without."""
        try:
            if self.connection.poll(max(0.0, self.deadline - time.monotonic())):
                answer: tuple[str, Any] = self.connection.recv()
                return answer
        except (EOFError, OSError):
            self.kill()
            raise CandidateFailed(Failure("crash", self._reason(f"the process ended with {self._ending()}"))) from None
        self.kill()
        raise CandidateFailed(Failure("timeout", self._reason(f"no answer within {self._patience:g} s")))

    def kill(self) -> None:
        """End the process and, on POSIX, all it started."""
        if self.connection.closed:
            return
        if sys.platform != "win32" and self._process.pid is not None:
            # Before join(): until then a dead process keeps its number, so the group is ours.
            with contextlib.suppress(ProcessLookupError):  # it had no time to become a group
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self.connection.close()

    def _expect_within(self, seconds: float) -> None:
        self._patience = seconds
        self.deadline = time.monotonic() + seconds
        self._log_start = self._log.stat().st_size  # earlier output belongs to earlier candidates

    def _ending(self) -> str:
        code = self._process.exitcode
        return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"

    def _reason(self, what: str) -> str:
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
        last = " | ".join([line for line in lines if line][-STDERR_LINES:])
        return shorten(f"{what}; last output: {last}") if last else what


def _kill_all(pool: dict[int, _Worker]) -> None:
    while pool:
        pool.popitem()[1].kill()


def _clean_up(pool: dict[int, _Worker], logs: Path) -> None:
    _kill_all(pool)
    shutil.rmtree(logs, ignore_errors=True)
