"""What is tuned (Task), what runs it (Runner), and the runner that stays in this process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from autotune.measure import Clock
from autotune.space import Config

FailureKind = Literal["rejected", "wrong", "error", "crash", "timeout"]

ConfigIn = TypeVar("ConfigIn", contravariant=True)
T = TypeVar("T")

# What compilers, drivers and memory raise. All else is a mistake in the task and surfaces.
DEVICE_FAILURES = (RuntimeError, MemoryError, OSError)
MAX_REASON = 1000  # characters


@dataclass(frozen=True)
class Failure:
    """Why a candidate cannot win.

    Attributes:
        kind: "rejected" by static facts, "wrong" numbers, "error" raised, "crash" of its process or device,
            "timeout".
        reason: what was found, raised or last written to stderr.
    """

    kind: FailureKind
    reason: str


class Rejected(Exception):
    """Raised by `Task.compile`: the compiled candidate is not worth running (spills, too much shared memory)."""


class CandidateFailed(Exception):
    """Raised by a runner: this candidate is out, the others go on."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.reason}")
        self.failure = failure


class DeviceLost(Exception):
    """The device answers this process no more, so nothing further can run in it."""


class TaskError(Exception):
    """The task itself is at fault: a programming error in it, or it could not be built."""


class Task(Protocol[ConfigIn]):
    """A tunable on one problem: owns its inputs and its reference result.

    A worker process builds it by calling a factory, and several may exist side by side: allocate inputs when they
    are first needed.
    """

    clock: Clock

    def compile(self, config: ConfigIn) -> None:
        """Fill the compiler's cache on disk, perhaps in another process than `prepare`; may raise Rejected."""

    def prepare(self, config: ConfigIn) -> Callable[[], object]:
        """A function that launches the candidate once and returns its output."""

    def check(self, output: object) -> str | None:
        """Compare a candidate's output with the reference: None when right, else what is wrong."""


class Runner(Protocol[Config]):
    """Runs candidates of one task, one at a time except for compilation.

    Attributes:
        batch: how many candidates `compile` should be given at once.
    """

    batch: int

    @property
    def clock(self) -> str:
        """Name of the task's clock."""

    def compile(self, configs: Sequence[Config]) -> dict[Config, Failure]:
        """Compile candidates; the failures."""

    def admit(self, config: Config) -> float:
        """Prepare the candidate, check its result and return a first sample in ms; raises CandidateFailed."""

    def sample(self, config: Config) -> float:
        """One sample in ms per call of an admitted candidate; raises CandidateFailed."""


class LocalRunner(Generic[Config]):
    """Runs candidates in this process: for CPUs, for simple kernels and for tests.

    A candidate that crashes or hangs takes the caller along, and one that poisons the device ends the search with
    DeviceLost; WorkerRunner guards against all three.
    """

    batch = 1

    def __init__(self, task: Task[Config]) -> None:
        self._task = task
        self._runs: dict[Config, Callable[[], object]] = {}
        self._samplers: dict[Config, Callable[[], float]] = {}

    @property
    def clock(self) -> str:
        return self._task.clock.name

    def compile(self, configs: Sequence[Config]) -> dict[Config, Failure]:
        failures = {}
        for config in configs:
            try:
                self._guard(self._task.compile, config)
            except CandidateFailed as failed:
                failures[config] = failed.failure
        return failures

    def admit(self, config: Config) -> float:
        """Prepare, check, warm up, take one sample; an admitted candidate is only checked again and sampled."""
        return self._guard(self._admit, config)

    def sample(self, config: Config) -> float:
        if config not in self._samplers:  # admitted in a process that a later candidate took down
            self.admit(config)
        return self._guard(lambda config: self._samplers[config](), config)

    def _admit(self, config: Config) -> float:
        if config not in self._runs:
            self._runs[config] = self._task.prepare(config)
        if complaint := self._task.check(self._runs[config]()):
            raise CandidateFailed(Failure("wrong", complaint))
        if config not in self._samplers:
            self._samplers[config] = self._task.clock.sampler(self._runs[config])
        return self._samplers[config]()

    def _guard(self, step: Callable[[Config], T], config: Config) -> T:
        """Turn the failures of compilers and devices into CandidateFailed."""
        try:
            return step(config)
        except Rejected as rejected:
            raise CandidateFailed(Failure("rejected", str(rejected))) from rejected
        except Exception as error:
            if not _is_device_failure(error):
                raise
            reason = shorten(f"{type(error).__name__}: {error}")
            try:
                self._task.clock.probe()
            except Exception as lost:
                raise DeviceLost(reason) from lost
            raise CandidateFailed(Failure("error", reason)) from error


def shorten(reason: str) -> str:
    """Drop the middle of a long reason: compilers quote the kernel between what failed and why."""
    if len(reason) <= MAX_REASON:
        return reason
    return f"{reason[: MAX_REASON // 2]} ... {reason[-MAX_REASON // 2 :]}"


def _is_device_failure(error: Exception) -> bool:
    """Triton's errors derive from Exception alone; they are known by their module, as triton may be absent."""
    return isinstance(error, DEVICE_FAILURES) or any(
        base.__module__.partition(".")[0] == "triton" for base in type(error).__mro__
    )
