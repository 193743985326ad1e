"""Time candidates: clocks for CPUs and GPUs, interleaved rounds, median and spread."""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

SAMPLE_MS = 5.0  # what one sample lasts: far above a clock's resolution, far below a user's patience
MAX_CALLS = 100  # calls in one sample at most
WARM_UP = 3  # calls before a capture: the first may compile, libraries choose and allocate in the next
TRIAL_ROUNDS = 2  # rounds before a candidate may be called hopeless: one hiccup disqualifies nobody


@dataclass(frozen=True)
class Timing:
    """One candidate's time.

    Attributes:
        median_ms: median over the rounds, milliseconds per call.
        spread: interquartile range divided by the median; 0 for a single round.
        rounds: samples behind both.
    """

    median_ms: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Timing":
        """Summarise `samples`, milliseconds per call, one per round."""
        median = statistics.median(samples)
        if len(samples) < 2 or median == 0:
            return cls(median, 0.0, len(samples))
        lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, (upper - lower) / median, len(samples))


class Clock(Protocol):
    """How a task's candidates are timed. `name` is stored: times of different clocks are never compared."""

    name: str

    def sampler(self, run: Callable[[], object]) -> Callable[[], float]:
        """Warm `run` up and choose the calls per sample; each call of the result takes one sample, in ms per call."""

    def probe(self) -> None:
        """Raise if the device no longer answers (a CUDA context stays poisoned after an illegal memory access)."""


class WallClock:
    """Monotonic wall clock, for CPUs; with `synchronize`, for any device that works asynchronously.

    Args:
        now: seconds, monotonic.
        synchronize: waits for the device; called around every sample.
    """

    name = "wall"

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, synchronize: Callable[[], object] = lambda: None
    ) -> None:
        self._now = now
        self._synchronize = synchronize

    def sampler(self, run: Callable[[], object]) -> Callable[[], float]:
        def sample(calls: int) -> float:
            self._synchronize()
            start = self._now()
            for _ in range(calls):
                run()
            self._synchronize()
            return (self._now() - start) * 1e3 / calls

        calls = _calls_per_sample(sample)
        return lambda: sample(calls)

    def probe(self) -> None:
        self._synchronize()


class EventClock:
    """Device events around every launch, for CUDA and ROCm, from a cache that holds nothing of the candidate's.

    In use a kernel finds its inputs in device memory, since a model's other layers passed through the L2 cache; a
    repeated one would find those that fit in the cache. What empties it also gives the host time to launch: only where
    one launch costs the host more than that does this measure the host. See GraphClock.

    Args:
        device: the device whose current stream `run` launches on.
    """

    name = "cuda-events"

    def __init__(self, device: "torch.device | str" = "cuda") -> None:
        self._device = device
        self._empty_cache: Callable[[], object] | None = None

    def sampler(self, run: Callable[[], object]) -> Callable[[], float]:
        calls = _calls_per_sample(lambda calls: self._mean_ms(run, calls))
        return lambda: self._mean_ms(run, calls)

    def probe(self) -> None:
        _cuda().synchronize(self._device)

    def _mean_ms(self, run: Callable[[], object], calls: int) -> float:
        cuda = _cuda()
        with cuda.device(self._device):
            self._empty_cache = self._empty_cache or _cache_emptier(self._device)
            pairs = [[cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
            for start, end in pairs:
                self._empty_cache()
                start.record()
                run()
                end.record()
            pairs[-1][1].synchronize()
            return math.fsum(start.elapsed_time(end) for start, end in pairs) / calls


class GraphClock(EventClock):
    """EventClock on the replay of a CUDA graph of `run`: the host's cost of its launches is no part of the time.

    `run` must be capturable: no synchronisation, no copy from or to the host. One that is not fails with an error, and
    the device can be used as before; it is not timed by another clock, whose times would not compare.
    """

    name = "cuda-graph"

    def __init__(self, device: "torch.device | str" = "cuda") -> None:
        super().__init__(device)
        self._pool: Any = None

    def sampler(self, run: Callable[[], object]) -> Callable[[], float]:
        cuda = _cuda()
        with cuda.device(self._device):
            # All graphs share one memory pool, where each overwrites the other's outputs: nobody reads them.
            self._pool = self._pool or cuda.graph_pool_handle()
            before, warm_up = cuda.current_stream(), cuda.Stream()
            warm_up.wait_stream(before)
            with cuda.stream(warm_up):
                for _ in range(WARM_UP):
                    run()
            before.wait_stream(warm_up)
            graph = cuda.CUDAGraph()
            try:
                with cuda.graph(graph, pool=self._pool):
                    run()
            except BaseException:
                self._recover(before)
                raise
        return super().sampler(graph.replay)

    def _recover(self, stream: Any) -> None:
        """Undo what torch leaves behind after a failed capture, so that whoever comes next can run at all.

        Its capture stream is still the current one, its allocator still serves the pool, and the device's default
        generator still counts for the graph: it refuses to draw until it is given another state.
        """
        import torch

        cuda = _cuda()
        cuda.set_stream(stream)
        device = torch.device(self._device)
        index = cuda.current_device() if device.index is None else device.index
        with contextlib.suppress(Exception):  # private, and without effect where the capture ended after all
            torch._C._cuda_endAllocateToPool(index, self._pool)
        self._pool = None
        generator = cuda.default_generators[index]
        fresh = torch.Generator(device).manual_seed(generator.initial_seed())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())


def _cache_emptier(device: "torch.device | str") -> Callable[[], object]:
    """Reads four times what the L2 cache holds. Writing would leave it to the next kernel to write that back."""
    import torch

    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)  # bytes; ROCm does not tell
    other = torch.zeros(size, dtype=torch.int32, device=device)
    found = torch.zeros((), dtype=torch.int32, device=device)
    return lambda: torch.amax(other, dim=0, out=found)


def _cuda() -> Any:
    """torch.cuda, imported late, so that a command that only reads the store starts without it.

    Any, because the annotations of events, streams and graphs differ between versions of torch.
    """
    import torch

    return torch.cuda


def clock_for(device: "torch.device | str", graphs: bool = True) -> Clock:
    """Choose the clock for `device`: CUDA graphs on CUDA and ROCm, the wall clock on CPUs and all else.

    Args:
        graphs: False for launches that cannot be captured: events around every launch instead of a graph.
    """
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        return GraphClock(device) if graphs else EventClock(device)
    if kind == "cpu":
        return WallClock()

    def synchronize() -> None:
        import torch

        torch.accelerator.synchronize(device)

    return WallClock(synchronize=synchronize)


@dataclass(frozen=True)
class Times(Generic[T]):
    """What `time_together` found: each run's timing, or the reason why it has none."""

    clock: str
    timings: dict[T, Timing]
    failed: dict[T, str]


def time_together(
    runs: Mapping[T, Callable[[], object]],
    clock: Clock,
    rounds: int,
    hopeless: float = math.inf,
    on_sample: Callable[[T, float | None], object] = lambda *_: None,
    go_on: Callable[[], bool] = lambda: True,
) -> Times[T]:
    """Time several runs in interleaved rounds of one clock; one that raises has no time, and the others go on.

    Args:
        runs: by name; each call of one is one execution.
        clock: times all of them, since times of two clocks do not compare.
        rounds: samples of each.
        hopeless: see `race`.
        on_sample: told of each run's warm-up, with None, and of each of its samples in ms; of a failure with None.
        go_on: see `race`.
    """
    samplers: dict[T, Callable[[], float]] = {}
    samples: dict[T, list[float]] = {}
    failed: dict[T, str] = {}

    def guarded(name: T, step: Callable[[], R]) -> R | None:
        try:
            return step()
        except Exception as error:
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())
            return None

    def sample(name: T) -> float | None:
        ms = guarded(name, samplers[name])
        on_sample(name, ms)
        return ms

    for name, run in runs.items():
        sampler = guarded(name, functools.partial(clock.sampler, run))
        on_sample(name, None)
        if sampler is not None:
            samplers[name] = sampler
    race(list(samplers), sample, samples, rounds=rounds, hopeless=hopeless, go_on=go_on)
    return Times(clock.name, {name: Timing.of(found) for name, found in samples.items()}, failed)


def race(
    entrants: Sequence[T],
    sample: Callable[[T], float | None],
    samples: dict[T, list[float]],
    *,
    rounds: int,
    hopeless: float = math.inf,
    go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Sample all entrants in interleaved rounds, so that a drifting machine drifts for all of them.

    Args:
        sample: one sample of a candidate in ms, or None when it failed and leaves the race.
        samples: receives each candidate's samples as they come, so that an interrupted race keeps them; a failed
            candidate's are removed.
        hopeless: from round 2 on, candidates leave whose fastest sample exceeds this many times the best median.
        go_on: asked before every round but the first; False ends the race.
    """
    running = list(entrants)
    for turn in range(rounds):
        if turn and not go_on():
            return
        # Every second round runs backwards: nobody always follows the same neighbour's heat and cache.
        for entrant in running if turn % 2 == 0 else running[::-1]:
            time_ms = sample(entrant)
            if time_ms is None:
                samples.pop(entrant, None)
            else:
                samples.setdefault(entrant, []).append(time_ms)
        running = [entrant for entrant in running if entrant in samples]
        if running and turn + 1 >= TRIAL_ROUNDS:
            limit = hopeless * min(statistics.median(samples[entrant]) for entrant in running)
            running = [entrant for entrant in running if min(samples[entrant]) <= limit]


def _calls_per_sample(sample: Callable[[int], float]) -> int:
    """Warm up, then the number of calls that fill a sample; `sample(calls)` is in ms per call."""
    sample(1)  # the first call may compile, page in and fill caches
    once = sample(1)
    calls = MAX_CALLS if once * MAX_CALLS <= SAMPLE_MS else max(1, math.ceil(SAMPLE_MS / once))
    sample(calls)
    return calls
