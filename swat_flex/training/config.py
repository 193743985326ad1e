"""`TrainingConfig`: how a model is trained, and the sizes to choose from."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from swat_flex.nn import SwatConfig
from swat_flex.training.data import VOCAB


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """AdamW with a linear warm-up and a cosine to a tenth, over `steps` or `minutes`, whichever ends first.

    Attributes:
        steps: of the optimizer; None leaves the end to minutes.
        minutes: of training; such a run follows the clock and does not repeat to the bit. None leaves the end to steps.
        length: tokens of a row.
        batch: rows of a step, over all ranks.
        learning_rate: its peak.
        warmup: steps to the peak.
        weight_decay: of matrices alone, not of norms, slopes and biases.
        beta1, beta2: of AdamW.
        clip: largest norm of the gradient.
        seed: of the weights and of the rows drawn.
        eval_every: steps between evaluations on held-out text.
        eval_tokens: tokens of one.
        save_every: steps between checkpoints.
        gradient_checkpointing: as `SwatTransformer`'s.

    Raises:
        ValueError: a value that breaks a rule above.
    """

    steps: int | None = None
    minutes: float | None = None
    length: int = 512
    batch: int = 8
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 200
    eval_tokens: int = 32768
    save_every: int = 200
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps: expected a number of steps, or minutes, got None for both")
        for name in ("steps", "length", "batch", "eval_every", "eval_tokens", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("minutes", "learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        for name in ("warmup", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over, 0 to 1."""
        by_step = 0.0 if self.steps is None else step / self.steps
        by_clock = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, max(by_step, by_clock))

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of step `step`, counted from 0."""
        cosine = 0.55 + 0.45 * math.cos(math.pi * progress)
        return self.learning_rate * min(1.0, (step + 1) / (self.warmup + 1)) * cosine

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Size:
    """A model of bytes, and what to train it with unless told otherwise."""

    model: SwatConfig
    training: dict[str, Any]


def _model(hidden_size: int, layers: int, heads: int, window: int) -> SwatConfig:
    """The recipe, `SwatConfig`'s defaults, for bytes."""
    return SwatConfig(vocab_size=VOCAB, hidden_size=hidden_size, layers=layers, heads=heads, window=window)


SIZES: dict[str, Size] = {
    "tiny": Size(_model(32, 2, 2, 16), {"length": 64, "batch": 4, "warmup": 5}),
    "small": Size(_model(192, 4, 4, 128), {"length": 512, "batch": 4, "learning_rate": 3e-3, "warmup": 100}),
    "medium": Size(
        _model(512, 8, 8, 256),
        {"length": 2048, "batch": 32, "learning_rate": 1e-3, "warmup": 200, "eval_tokens": 2**18, "save_every": 500},
    ),
    "large": Size(
        _model(1024, 16, 16, 512),
        {"length": 4096, "batch": 32, "learning_rate": 6e-4, "warmup": 500, "eval_tokens": 2**19, "save_every": 500},
    ),
}
