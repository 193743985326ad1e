import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from autotune import EventClock, GraphClock, Timing, WallClock, clock_for, measure, time_together
from autotune.measure import MAX_CALLS, race


def test_timing_is_the_median_and_the_interquartile_range_over_it():
    assert Timing.of([4.0, 1.0, 2.0, 3.0, 100.0]) == Timing(3.0, (4.0 - 2.0) / 3.0, 5)
    assert Timing.of([7.0]) == Timing(7.0, 0.0, 1)


class FakeTime:
    """Time passes only in `run`."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)
        self.now = 100.0
        self.calls = 0

    def run(self):
        self.calls += 1
        self.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]


@pytest.mark.parametrize(
    ("seconds", "calls"), [(1.0, 1), (0.001, 5), (0.0004, 13), (1e-6, MAX_CALLS), (0.0, MAX_CALLS)]
)
def test_wall_clock_warms_up_and_fills_a_sample(seconds, calls):
    time = FakeTime(30.0, seconds)  # the first call compiles for half a minute
    sample = WallClock(now=lambda: time.now).sampler(time.run)
    warm = time.calls
    assert sample() == pytest.approx(seconds * 1e3)
    assert time.calls - warm == calls


def test_wall_clock_synchronises_around_a_sample():
    time, log = FakeTime(1.0), []
    clock = WallClock(now=lambda: log.append("now") or time.now, synchronize=lambda: log.append("wait"))
    sample = clock.sampler(time.run)
    log.clear()
    sample()
    assert log == ["wait", "now", "wait", "now"]


def test_clock_for_a_device():
    assert clock_for("cpu").name == "wall"
    assert clock_for("cuda:1").name == "cuda-graph"
    assert clock_for("cuda:1", graphs=False).name == "cuda-events"
    assert clock_for("mps").name == "wall"


def run_race(times, **options):
    """Race scripted candidates; the samples and the order in which they were taken."""
    scripts = {name: iter(script) for name, script in times.items()}
    samples, order = {}, []

    def sample(name):
        order.append(name)
        return next(scripts[name])

    race(list(times), sample, samples, **options)
    return samples, order


def test_rounds_are_interleaved_and_alternate_their_direction():
    samples, order = run_race({"a": [1, 2], "b": [3, 4], "c": [5, 6]}, rounds=2)
    assert samples == {"a": [1, 2], "b": [3, 4], "c": [5, 6]}
    assert order == list("abccba")


def test_a_failed_candidate_leaves_without_its_samples():
    samples, _ = run_race({"a": [1, 1, 1], "b": [1, None]}, rounds=3)
    assert samples == {"a": [1, 1, 1]}


def test_the_hopeless_stop_early_but_one_hiccup_is_forgiven():
    samples, _ = run_race({"a": [1] * 5, "slow": [9, 9], "hiccup": [9, 1, 1, 1, 1]}, rounds=5, hopeless=1.5)
    assert [len(samples[name]) for name in ("a", "slow", "hiccup")] == [5, 2, 5]


def test_a_race_that_may_not_go_on_ends_after_its_round():
    samples, _ = run_race({"a": [1, 1], "b": [1, 1]}, rounds=2, go_on=lambda: False)
    assert samples == {"a": [1], "b": [1]}


def test_runs_are_timed_together_and_one_that_fails_costs_the_others_nothing():
    time, told = FakeTime(0.004), []

    def fails():
        raise RuntimeError("no\nkernel")

    left = iter(range(8))

    def dies():
        next(left)  # StopIteration in the midst of the race
        time.run()

    clock = WallClock(now=lambda: time.now)
    found = time_together(
        {"a": time.run, "fails": fails, "dies": dies}, clock, 3, on_sample=lambda *what: told.append(what)
    )
    assert found.clock == "wall"
    assert {name: timing.rounds for name, timing in found.timings.items()} == {"a": 3}
    assert found.timings["a"].median_ms == pytest.approx(4.0)
    assert found.failed == {"fails": "RuntimeError: no kernel", "dies": "StopIteration:"}
    assert [ms for name, ms in told if name == "a"] == [None, *[pytest.approx(4.0)] * 3]


class FakeCuda:
    """torch.cuda with one stream: launches advance time by 1 ms, by half of it where the cache was not emptied before;
    captured launches cost nothing until replayed.
    """

    def __init__(self):
        self.now = 0.0
        self.capturing = None
        self.pools = []
        self.empty = False
        self.generator = torch.Generator()

    def launch(self):
        if self.capturing is None:
            self.now += 1.0 if self.empty else 0.5
            self.empty = False
        else:
            self.capturing.launches += 1

    def empty_cache(self):
        assert self.capturing is None
        self.now += 0.25
        self.empty = True

    def install(self, monkeypatch):
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                assert cuda.capturing is None
                self.at = cuda.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            launches = 0

            def replay(self):
                for _ in range(self.launches):
                    cuda.launch()

        class Stream:
            def wait_stream(self, other):
                assert isinstance(other, Stream)

        @contextlib.contextmanager
        def capture(graph, pool):
            cuda.pools.append(pool)
            cuda.capturing, cuda.current = graph, "capture stream"
            yield
            cuda.capturing, cuda.current = None, cuda.first

        @contextlib.contextmanager
        def stream(stream):
            before, cuda.current = cuda.current, stream
            yield
            cuda.current = before  # as in torch, not where an error passes

        cuda.current = cuda.first = Stream()
        fakes = {
            "current_device": lambda: 0,
            "set_stream": lambda stream: setattr(cuda, "current", stream),
            "default_generators": [cuda.generator],
            "device": lambda _: contextlib.nullcontext(),
            "stream": stream,
            "Event": Event,
            "Stream": Stream,
            "current_stream": lambda: cuda.current,
            "CUDAGraph": Graph,
            "graph": capture,
            "graph_pool_handle": lambda: "pool",
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(measure, "_cache_emptier", lambda device: self.empty_cache)


@pytest.mark.parametrize("clock", [EventClock, GraphClock])
def test_device_clocks_on_a_fake_device(clock, monkeypatch):
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    timer = clock("cuda")
    for _ in range(2):
        sample = timer.sampler(cuda.launch)
        before = cuda.now
        assert sample() == 1.0
        assert cuda.now - before == 5 * 1.25  # milliseconds: five launches, each after the cache was emptied
    assert cuda.pools == (["pool", "pool"] if clock is GraphClock else [])


def test_a_failed_capture_leaves_the_device_as_it_was(monkeypatch):
    """As torch leaves it: with its capture stream current and its generator waiting for the capture's end."""
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    states = []
    monkeypatch.setattr(cuda, "generator", SimpleNamespace(initial_seed=lambda: 7, graphsafe_set_state=states.append))
    monkeypatch.setattr(torch.cuda, "default_generators", [cuda.generator])
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=Fresh))
    timer = GraphClock("cuda")

    def synchronises():
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        cuda.launch()

    with pytest.raises(RuntimeError, match="capturing"):
        timer.sampler(synchronises)
    assert cuda.current is cuda.first
    assert states == ["state of seed 7"]
    cuda.capturing = None
    assert timer.sampler(cuda.launch)() == 1.0  # who comes next is timed


class Fresh:
    def __init__(self, seed):
        self.seed = seed

    def graphsafe_get_state(self):
        return f"state of seed {self.seed}"


@pytest.mark.parametrize("clock", [EventClock, GraphClock])
def test_device_clocks_on_a_real_device(clock):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.randn(512, 512, device="cuda")
    timer = clock("cuda")
    assert 0 < timer.sampler(lambda: x @ x)() < math.inf
    timer.probe()
