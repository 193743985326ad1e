"""Find the fastest configuration that is right."""

import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from autotune.measure import Timing, race
from autotune.runner import CandidateFailed, Failure, Runner
from autotune.space import Config, Space

T = TypeVar("T")
EventKind = Literal["planned", "started", "measured", "failed", "best"]

SAMPLE = 32  # candidates that halving starts with
FIRST_ROUNDS = 3  # of the first halving; doubles up to ROUNDS
ROUNDS = 7
FINALISTS = 4  # and the default
FINAL_ROUNDS = 15
HOPELESS = 1.5  # times the best median
MIN_GAIN = 0.005  # of the time: a smaller gain is not worth leaving an earlier candidate


@dataclass(frozen=True)
class Budget:
    """When to start no more batches of candidates (see Runner.batch); the final comparison takes place in any case.

    Attributes:
        seconds: of the search's clock; None is no limit.
        trials: candidates started, the default included; None is no limit.

    Raises:
        ValueError: a limit that is not positive.
    """

    seconds: float | None = None
    trials: int | None = None

    def __post_init__(self) -> None:
        for name, limit in {"seconds": self.seconds, "trials": self.trials}.items():
            if limit is not None and limit <= 0:
                raise ValueError(f"{name}: expected a number above 0 or None, got {limit}")


NO_LIMIT = Budget()


@dataclass(frozen=True)
class Event(Generic[Config]):
    """Progress of a search.

    Attributes:
        kind: "planned": `planned` changed; "started": compilation or checks of `config` began; "measured": it has a
            (new) timing; "failed": it is out; "best": it has the lowest median so far.
        planned: candidates the search now means to try.
        done: candidates that were timed or failed.
    """

    kind: EventKind
    planned: int
    done: int
    config: Config | None = None
    timing: Timing | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Result(Generic[Config]):
    """What a search found.

    Attributes:
        winner: the fastest right configuration; None when none was right.
        default: the space's first configuration.
        timings: every right configuration's last timing, in the space's order.
        failures: every other configuration tried.
        clock: name of the clock that timed them.
        interrupted: Ctrl-C came before the final comparison was over.
    """

    winner: Config | None
    default: Config
    timings: Mapping[Config, Timing]
    failures: Mapping[Config, Failure]
    clock: str
    interrupted: bool

    @property
    def speedup(self) -> float | None:
        """Default's time over the winner's; None when either has none."""
        if self.winner is None or self.default not in self.timings:
            return None
        return self.timings[self.default].median_ms / self.timings[self.winner].median_ms


def search(
    space: Space[Config],
    runner: Runner[Config],
    *,
    reject: Callable[[Config], str | None] = lambda _: None,
    budget: Budget = NO_LIMIT,
    exhaustive: int = 64,
    on_event: Callable[[Event[Config]], object] = lambda _: None,
    now: Callable[[], float] = time.monotonic,
    seed: int = 0,
) -> Result[Config]:
    """Search `space` for the fastest configuration that is right.

    Small spaces are tried whole; of larger ones a random sample is halved by time, then single steps are taken from
    the best while they help. The fastest and the default then meet in fresh interleaved rounds: luck in earlier
    rounds counts for nothing, and of two that tie the earlier in the space wins. A candidate is timed only after its
    result passed the task's check, and the winner passes it once more at the end.

    Args:
        reject: static facts: a reason why a candidate should not even start, or None.
        budget: when to stop trying more.
        exhaustive: the largest number of candidates to try whole.
        now: seconds, monotonic; the clock of `budget.seconds`.
        seed: of the random sample.

    Returns:
        The result; after Ctrl-C what was measured until then, marked as interrupted.

    Raises:
        TaskError: the task is at fault, in a worker; a LocalRunner lets its own exception through.
        DeviceLost: a candidate took the device along, and no worker guarded it.
    """
    return _Search(space, runner, reject, budget, exhaustive, on_event, now, random.Random(seed), now()).run()


def decide(timings: Mapping[Config, Timing]) -> Config:
    """The winner among timings of the same rounds, in order of preference.

    A later candidate takes the lead only when its median lies below the leader's by more than its own interquartile
    range (and MIN_GAIN), so that what is noisy must win by more than its noise.
    """
    leader, *others = timings
    for config in others:
        timing, best = timings[config], timings[leader].median_ms
        if timing.median_ms * (1 + timing.spread) < best * (1 - MIN_GAIN):
            leader = config
    return leader


@dataclass
class _Search(Generic[Config]):
    """The state of one search. Every candidate tried is in `timings` or in `failures`."""

    space: Space[Config]
    runner: Runner[Config]
    reject: Callable[[Config], str | None]
    budget: Budget
    exhaustive: int
    on_event: Callable[[Event[Config]], object]
    now: Callable[[], float]
    chance: random.Random
    started_at: float
    timings: dict[Config, Timing] = field(default_factory=dict)
    failures: dict[Config, Failure] = field(default_factory=dict)
    trials: int = 0
    planned: int = 0
    best: Config | None = None

    def run(self) -> Result[Config]:
        winner, interrupted, clock = None, False, ""
        try:
            clock = self.runner.clock
            self.explore()
            winner = self.final()
        except KeyboardInterrupt:
            interrupted = True
            winner = decide(self.in_order(self.timings)) if self.timings else None
        timings, failures = self.in_order(self.timings), self.in_order(self.failures)
        return Result(winner, self.space.default, timings, failures, clock, interrupted)

    def explore(self) -> None:
        """Time the whole space, or a sample of it and the neighbourhood of the best."""
        default, *others = self.space.candidates
        size = 1 + len(others)
        trials = size if self.budget.trials is None else self.budget.trials
        if size <= min(trials, self.exhaustive):
            self.race(self.enlist(self.space.candidates, limit=size), ROUNDS)
            return
        # Half of the budget for the sample, the other half for steps from its best.
        self.chance.shuffle(others)
        others.sort(key=lambda config: config not in self.space.first)
        best = self.halve(self.enlist([default, *others], limit=min(SAMPLE, max(1, trials // 2)), share=0.5))
        while best is not None and not self.spent():
            best = self.step_from(best)

    def enlist(self, configs: Iterable[Config], limit: int, share: float = 1.0) -> list[Config]:
        """Compile, check and time once until `limit` candidates were right or this share of the budget is spent."""
        queue, enlisted = deque(configs), list[Config]()
        while queue and len(enlisted) < limit and not self.spent(share):
            wanted = min(limit - len(enlisted), len(queue))
            if self.budget.trials is not None:
                wanted = min(wanted, self.budget.trials - self.trials)
            planned = len(self.timings) + len(self.failures) + wanted
            if planned != self.planned:
                self.planned = planned
                self.tell("planned")
            batch = self.draw(queue, min(wanted, self.runner.batch))
            for config, failure in self.runner.compile(batch).items():
                self.fail(config, failure)
            for config in batch:
                if config not in self.failures and (first := self.attempt(self.runner.admit, config)) is not None:
                    self.note(config, [first])
                    enlisted.append(config)
        return enlisted

    def draw(self, queue: deque[Config], size: int) -> list[Config]:
        """Take the next `size` candidates to which static facts have no objection."""
        batch: list[Config] = []
        while queue and len(batch) < size:
            config = queue.popleft()
            if reason := self.reject(config):
                self.fail(config, Failure("rejected", reason))
                continue
            self.trials += 1
            batch.append(config)
            self.tell("started", config)
        return batch

    def halve(self, entrants: Sequence[Config]) -> Config | None:
        """Race with ever more rounds for ever fewer candidates; the fastest."""
        rounds = FIRST_ROUNDS
        while len(entrants) > FINALISTS:
            ranked = self.race(entrants, rounds)
            entrants = ranked[: max(FINALISTS, len(ranked) // 2)]
            rounds = min(2 * rounds, ROUNDS)
        return next(iter(self.race(entrants, ROUNDS)), None)

    def step_from(self, best: Config) -> Config | None:
        """The fastest of `best`'s untried neighbours if it is faster still."""
        steps = [c for c in self.space.neighbours(best) if c not in self.timings and c not in self.failures]
        entrants = self.enlist(steps, limit=len(steps))
        ranked = self.race([best, *entrants], ROUNDS) if entrants else []
        return ranked[0] if ranked and ranked[0] != best else None

    def final(self) -> Config | None:
        """Compare the fastest and the default afresh; the winner, checked once more."""
        while self.timings:
            fastest = sorted(self.timings, key=lambda config: self.timings[config].median_ms)[:FINALISTS]
            finalists = [c for c in self.timings if c in fastest or c == self.space.default]
            self.race(finalists, FINAL_ROUNDS, final=True)
            while standing := [config for config in finalists if config in self.timings]:
                winner = decide(self.in_order({config: self.timings[config] for config in standing}))
                if self.attempt(self.runner.admit, winner) is not None:
                    return winner
        return None

    def race(self, entrants: Sequence[Config], rounds: int, final: bool = False) -> list[Config]:
        """Time the entrants in interleaved rounds; those that stood them, the fastest of this race first."""
        samples: dict[Config, list[float]] = {}
        try:
            race(
                entrants,
                lambda config: self.attempt(self.runner.sample, config),
                samples,
                rounds=rounds,
                hopeless=math.inf if final else HOPELESS,
                go_on=lambda: final or not self.spent(),
            )
        finally:  # Ctrl-C keeps what was measured
            for config, taken in samples.items():
                self.note(config, taken)
        return sorted(samples, key=lambda config: statistics.median(samples[config]))

    def attempt(self, step: Callable[[Config], float], config: Config) -> float | None:
        try:
            return step(config)
        except CandidateFailed as failed:
            self.fail(config, failed.failure)
            return None

    def note(self, config: Config, samples: Sequence[float]) -> None:
        """Keep a candidate's new timing, unless an interrupted race gave fewer samples than there were."""
        if config in self.timings and len(samples) < self.timings[config].rounds:
            return
        timing = self.timings[config] = Timing.of(samples)
        self.tell("measured", config, timing)
        if self.best not in self.timings or timing.median_ms < self.timings[self.best].median_ms:
            self.best = config
            self.tell("best", config, timing)

    def fail(self, config: Config, failure: Failure) -> None:
        self.timings.pop(config, None)
        self.failures[config] = failure
        self.tell("failed", config, failure=failure)

    def tell(
        self,
        kind: EventKind,
        config: Config | None = None,
        timing: Timing | None = None,
        failure: Failure | None = None,
    ) -> None:
        done = len(self.timings) + len(self.failures)
        self.on_event(Event(kind, self.planned, done, config, timing, failure))

    def spent(self, share: float = 1.0) -> bool:
        """Tell whether to start nothing more; the default always starts."""
        out_of_trials = self.budget.trials is not None and self.trials >= self.budget.trials
        out_of_time = self.budget.seconds is not None and self.now() - self.started_at >= share * self.budget.seconds
        return self.trials > 0 and (out_of_trials or out_of_time)

    def in_order(self, found: Mapping[Config, T]) -> dict[Config, T]:
        """Sorted as the space is."""
        return {config: found[config] for config in self.space.candidates if config in found}
