"""`python -m perf bars`: what the kernels of a CPU are held to, all of it timed in the same rounds.

So any two times of a record compare: shares of a matrix product, speed-ups over others, 16 bits over 32, long rows over
short ones. What no race can hold is timed right after them: a layer beside a process that burns one core, and training.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from autotune import WallClock, time_together
from perf import cases
from perf.cases import PASSES, Case, Passes
from perf.measure import COPY, MATMUL, Advance, Setting, run_races_together
from perf.peers.ours import Swat, SwatDecode
from perf.peers.peer import Peer
from perf.peers.pytorch import FlexSoftmax, SdpaCausal
from perf.record import Race, Record
from swat_flex.problem import Backend
from swat_flex.training import SIZES, Corpus, Trainer, TrainingConfig, read_corpus

WORDS: dict[Passes, str] = {"forward": "forward", "both": "forward and backward"}
LAYER, GROUPED, NARROW = cases.CPU[:3]
MORE = cases.BARS
# Least share of a matrix product's FLOP/s: forward, forward and backward.
SHARES = {
    LAYER.name: (0.85, 0.90),
    NARROW.name: (0.50, 0.50),
    GROUPED.name: (0.75, 0.75),
    "wide heads": (0.85, 0.85),
    "odd heads": (0.70, 0.70),
    "odd shape": (0.45, 0.45),
}
CPP, BANDED, FLEX, SDPA = "swat cpp", "swat banded", "FlexAttention softmax", "SDPA causal"
BESIDE, TRAINING = "beside a busy process", "training"
BURN = "while True: pass"


def contests() -> list[tuple[Case, Passes, tuple[Peer, ...]]]:
    """Every race; the first one's dtype is that of the matrix product."""
    cpp, banded, flex, sdpa = Swat("cpp"), Swat("banded"), FlexSoftmax(), SdpaCausal()
    more: dict[tuple[str, Passes], tuple[Peer, ...]] = {
        (LAYER.name, "forward"): (banded, flex),
        (LAYER.name, "both"): (banded, sdpa),
        (NARROW.name, "forward"): (flex,),
    }
    layers = (LAYER, GROUPED, NARROW, *(case for case in MORE.values() if not case.decodes))
    found = [(case, passes, (cpp, *more.get((case.name, passes), ()))) for case in layers for passes in PASSES]
    return [*found, (MORE["step"], "forward", (SwatDecode("cpp"), SwatDecode("banded")))]


def measure(setting: Setting, advance: Advance) -> tuple[tuple[Race, ...], dict[str, float]]:
    """Time everything; returns the races and the figures that are none."""
    chosen = contests()
    races, runs = run_races_together(chosen, setting, advance)
    named = {
        f"{case.name}, {passes}, {name}": runs[n, name]
        for n, (case, passes, _) in enumerate(chosen)
        for name in (CPP, BANDED)
        if case is LAYER and (n, name) in runs
    }
    advance(f"{BESIDE}, {setting.rounds} rounds")
    figures = {f"{BESIDE}, {name}": ms for name, ms in _beside(named, setting.rounds).items()}
    advance(f"{TRAINING}, {setting.rounds} rounds")
    return races, figures | _training(setting.rounds)


def _beside(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median ms of each run beside a process that burns one core."""
    burner = subprocess.Popen([sys.executable, "-c", BURN])
    try:
        times = time_together(runs, WallClock(), rounds).timings
    finally:
        burner.kill()
        burner.wait()
    return {name: timing.median_ms for name, timing in times.items()}


def _training(rounds: int) -> dict[str, float]:
    """Tokens per second of `swat-flex train`'s small model by backend, in the same rounds."""
    settings = TrainingConfig(**{"minutes": 10.0, **SIZES["small"].training})
    corpus = read_corpus()
    backends: tuple[Backend, ...] = ("cpp", "banded")
    with tempfile.TemporaryDirectory() as folder:
        runs = {backend: _step(_trainer(backend, settings, corpus, Path(folder))) for backend in backends}
        times = time_together(runs, WallClock(), rounds).timings
    tokens = settings.batch * settings.length
    return {f"{TRAINING}, {name}": tokens / timing.median_ms * 1e3 for name, timing in times.items()}


def _trainer(backend: Backend, settings: TrainingConfig, corpus: Corpus, folder: Path) -> Trainer:
    return Trainer(dataclasses.replace(SIZES["small"].model, backend=backend), settings, corpus, folder)


def _step(trainer: Trainer) -> Callable[[], object]:
    """A training step as the trainer does it, on one batch."""
    batch, parameters = trainer.sampler(0), list(trainer.model.parameters())

    def step() -> None:
        trainer.model.loss(*batch).backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(parameters, trainer.training.clip)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


@dataclass(frozen=True)
class Line:
    """One thing measured; `bar` is the least, or with `at_most` the most, that it may be."""

    what: str
    value: float
    bar: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.bar if self.at_most else self.value >= self.bar

    @property
    def bound(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bar:g}"


def lines(record: Record) -> list[Line]:
    """What a record says of every bar; one whose contender has no time is left out."""
    found = _Found(record)
    result = []
    for name, bars in SHARES.items():
        for passes, bar in zip(PASSES, bars, strict=True):
            result.append((f"{name}, {WORDS[passes]}: share of matmul", found.share(name, passes), bar, False))
    layer, narrow, both = LAYER.name, NARROW.name, WORDS["both"]
    result += [
        (f"{layer}, forward: faster than {FLEX}", found.ratio(layer, "forward", FLEX), 1.7, False),
        (f"{narrow}, forward: faster than {FLEX}", found.ratio(narrow, "forward", FLEX), 2.5, False),
        (f"{layer}, {both}: faster than {SDPA}", found.ratio(layer, "both", SDPA), 5.0, False),
    ]
    for passes in PASSES:
        words, alone = WORDS[passes], found.ms(layer, passes)
        beside = record.figures.get(f"{BESIDE}, {layer}, {passes}, {CPP}")
        result += [
            (f"bfloat16 over float32, {words}", _over(found.ms("16 bits", passes), alone), 1.2, True),
            (f"32,768 tokens over 4,096, {words}", _over(found.ms("long", passes), alone), 8.8, True),
            (f"{BESIDE} over alone, {words}", _over(beside, alone), 2.5, True),
        ]
    result.append(("decoding step: bytes of keys and values over a copy's read rate", found.read_rate(), 0.6, False))
    return [Line(what, value, bar, at_most) for what, value, bar, at_most in result if value is not None]


def notes(record: Record) -> list[str]:
    """What has no bar."""
    speed = {name: record.figures.get(f"{TRAINING}, {name}") for name in ("cpp", "banded")}
    told = ", ".join(f"{tokens:,.0f} tokens per second with {name}" for name, tokens in speed.items() if tokens)
    return [f"`swat-flex train`, the small model: {told}."] if told else []


class _Found:
    """Times of a record by case and passes; None for who has none."""

    def __init__(self, record: Record) -> None:
        self.races = {(race.case.name, race.passes): race for race in record.races}

    def ms(self, name: str, passes: Passes, peer: str = CPP) -> float | None:
        race = self.races.get((name, passes))
        row = race and race.row(peer)
        return row.ms if row else None

    def ratio(self, name: str, passes: Passes, peer: str) -> float | None:
        return _over(self.ms(name, passes, peer), self.ms(name, passes))

    def share(self, name: str, passes: Passes) -> float | None:
        race = self.races.get((name, passes))
        row = race and race.row(CPP)
        return row.flops / row.ms * 1e3 / race.ceilings[MATMUL].per_second if race and row else None

    def read_rate(self) -> float | None:
        """A copy reads half of what it moves."""
        race = self.races.get(("step", "forward"))
        row = race and race.row("swat_decode cpp")
        return row.bytes / row.ms * 1e3 / (race.ceilings[COPY].per_second / 2) if race and row else None


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b
