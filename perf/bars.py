"""`python -m perf bars`: what the kernels of a CPU are held to, all of it timed in the same rounds.

So any two times of a record compare: shares of a matrix product, speed-ups over others, 16 bits over 32, long rows over
short ones. What no race can hold is timed right after them: a layer beside a process that burns one core, and training.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from autotune import WallClock, time_together
from perf import cases
from perf.cases import PASSES, WORDS, Case, Passes
from perf.measure import COPY, MATMUL, Advance, Setting, bind, run_races
from perf.peers.ours import Swat, SwatDecode
from perf.peers.peer import Peer
from perf.peers.pytorch import FlexSoftmax, SdpaCausal
from perf.record import Race, Record
from swat_flex.problem import Backend
from swat_flex.training import SIZES, Trainer, TrainingConfig, read_corpus

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
# How many times as long others take at least.
FASTER: tuple[tuple[Case, Passes, str, float], ...] = (
    (LAYER, "forward", FLEX, 1.7),
    (NARROW, "forward", FLEX, 2.5),
    (LAYER, "both", SDPA, 5.0),
)
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
    races = run_races(chosen, dataclasses.replace(setting, hopeless=math.inf), advance)
    named = {
        f"{case.name}, {passes}, {peer.name}": bind(peer, case, passes, case.tensors(setting.device))[0]
        for (case, passes, peers), race in zip(chosen, races, strict=True)
        for peer in peers
        if case is LAYER and peer.name in (CPP, BANDED) and race.row(peer.name)
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
    models = {backend: dataclasses.replace(SIZES["small"].model, backend=backend) for backend in backends}
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: _step(Trainer(model, settings, corpus, Path(folder))) for name, model in models.items()}
        times = time_together(runs, WallClock(), rounds).timings
    tokens = settings.batch * settings.length
    return {f"{TRAINING}, {name}": tokens / timing.median_ms * 1e3 for name, timing in times.items()}


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
    races = {(race.case.name, race.passes): race for race in record.races}
    timed = {(*key, row.peer): row for key, race in races.items() for row in race.timed}
    ms = {key: row.ms for key, row in timed.items()}
    found: list[Line] = []

    def ratio(what: str, a: float | None, b: float | None, bar: float, at_most: bool = False) -> None:
        if a is not None and b is not None:
            found.append(Line(what, a / b, bar, at_most))

    for name, bars in SHARES.items():
        for passes, bar in zip(PASSES, bars, strict=True):
            if row := timed.get((name, passes, CPP)):
                product = races[name, passes].ceilings[MATMUL]
                ratio(f"{name}, {WORDS[passes]}: share of matmul", row.flops_per_second, product.per_second, bar)
    for case, passes, peer, bar in FASTER:
        a, b = ms.get((case.name, passes, peer)), ms.get((case.name, passes, CPP))
        ratio(f"{case.name}, {WORDS[passes]}: faster than {peer}", a, b, bar)
    for passes in PASSES:
        words, alone = WORDS[passes], ms.get((LAYER.name, passes, CPP))
        beside = record.figures.get(f"{BESIDE}, {LAYER.name}, {passes}, {CPP}")
        ratio(f"bfloat16 over float32, {words}", ms.get(("16 bits", passes, CPP)), alone, 1.2, at_most=True)
        ratio(f"32,768 tokens over 4,096, {words}", ms.get(("long", passes, CPP)), alone, 8.8, at_most=True)
        ratio(f"{BESIDE} over alone, {words}", beside, alone, 2.5, at_most=True)
    if row := timed.get(("step", "forward", "swat_decode cpp")):
        read = races["step", "forward"].ceilings[COPY].per_second / 2  # a copy reads half of what it moves
        ratio("decoding step: bytes of keys and values over a copy's read rate", row.bytes_per_second, read, 0.6)
    return found


def notes(record: Record) -> list[str]:
    """What has no bar."""
    speed = {name: record.figures.get(f"{TRAINING}, {name}") for name in ("cpp", "banded")}
    told = ", ".join(f"{tokens:,.0f} tokens per second with {name}" for name, tokens in speed.items() if tokens)
    return [f"`swat-flex train`, the small model: {told}."] if told else []
