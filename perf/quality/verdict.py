"""What the numbers say: means with their confidence, and which of the paper's orderings hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from perf.quality.experiment import VARIANTS, Run

# Student's t, two-sided 95%, by the number of values.
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True, slots=True)
class Mean:
    """value ± half is a 95% confidence interval; half is infinite for one value."""

    value: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        if n < 2:
            return cls(values[0], math.inf)
        return cls(statistics.fmean(values), _T.get(n, 2.262) * statistics.stdev(values) / math.sqrt(n))

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ± {self.half:.3f}" if math.isfinite(self.half) else "")


_SLOPED = "sliding softmax, RoPE, QK-norm, learnt ALiBi"
# (worse, better): neighbours in the paper's Table 3 and what its text makes of them; then what is said of the recipe.
ORDERINGS = (
    ("full sigmoid, RoPE", "full softmax, RoPE", "A sigmoid without a window or a bias is worse than softmax"),
    ("full softmax, RoPE", "sliding softmax, RoPE", "Training with a window carries over to long texts"),
    ("sliding softmax, RoPE", "SWAT 12:0", "A sigmoid with a bias beats softmax in the same window"),
    ("SWAT 8:4", "SWAT 12:0", "Favouring recent tokens alone beats 8:4"),
    ("SWAT 6:6", "SWAT 8:4", "8:4 beats the balanced 6:6"),
    ("SWAT 6:6", "SWAT 6:6, RoPE", "Adding RoPE to the bias helps"),
    ("SWAT 12:0", "SWAT recipe", "The recipe beats the paper's start"),
    ("sliding softmax, RoPE", "SWAT recipe", "SWAT by the recipe beats softmax in the same window"),
    ("sliding softmax, RoPE, QK-norm", "SWAT recipe", "It beats softmax with QK-norm too"),
    (_SLOPED, "SWAT recipe", "It beats softmax that has the same learnt slopes"),
    (f"{_SLOPED}, root norm", "SWAT recipe", "It beats softmax that has slopes and root norm"),
    (f"{_SLOPED} + slopes at 3 times the rate", "SWAT recipe", "It beats softmax whose slopes learn faster"),
    ("SWAT recipe, no root norm", "SWAT recipe", "Root norm helps"),
    ("SWAT recipe, no QK-norm", "SWAT recipe", "QK-norm helps"),
    ("SWAT recipe, nothing learnt", "SWAT recipe", "Learning slopes and bias helps"),
    ("SWAT recipe, 6:6", "SWAT recipe", "Favouring recent tokens alone beats 6:6 in the recipe too"),
    ("SWAT recipe, no RoPE", "SWAT recipe", "RoPE helps beside the recipe's slopes"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """gain: by how many bits per byte the `better` variant is ahead, paired by seed."""

    worse: str
    better: str
    claim: str
    paper: float | None
    gain: Mean
    seeds: int

    @property
    def outcome(self) -> str:
        if self.gain.value - self.gain.half > 0:
            return "holds"
        if self.gain.value + self.gain.half < 0:
            return "the reverse holds"
        return f"not decided by {self.seeds} seed" + "s" * (self.seeds > 1)


def verdicts(runs: Sequence[Run], length: int) -> list[Verdict]:
    """Every ordering whose two variants share seeds, at rows of `length` tokens."""
    loss = {(run.variant, run.seed): run.loss[length] for run in runs}
    found = []
    for worse, better, claim in ORDERINGS:
        seeds = sorted(seed for name, seed in loss if name == worse and (better, seed) in loss)
        if seeds:
            gain = Mean.of([loss[worse, seed] - loss[better, seed] for seed in seeds])
            losses = VARIANTS[worse].paper, VARIANTS[better].paper
            paper = None if losses[0] is None or losses[1] is None else losses[0] - losses[1]
            found.append(Verdict(worse, better, claim, paper, gain, len(seeds)))
    return found
