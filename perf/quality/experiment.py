"""What is trained and how it is judged: the kinds of attention, the sizes, one run."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_flex.nn import SwatConfig, SwatTransformer
from swat_flex.training import Corpus, Trainer, TrainingConfig
from swat_flex.training.data import SEPARATOR, VOCAB, rows
from swat_flex.training.parallel import Ranks

MULTIPLES = (1, 4, 16)  # of the training length, at which the held-out text is read


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of attention; `paper` is its loss in Table 3 (average over three texts)."""

    sliding: bool
    activation: str
    slopes: str | None
    rope: bool
    paper: float


VARIANTS = {
    "full softmax, RoPE": Variant(False, "softmax", None, True, 5.5149),
    "full sigmoid, RoPE": Variant(False, "sigmoid", None, True, 10.5744),
    "sliding softmax, RoPE": Variant(True, "softmax", None, True, 4.9217),
    "SWAT 12:0": Variant(True, "sigmoid", "12:0", False, 2.6200),
    "SWAT 8:4": Variant(True, "sigmoid", "8:4", False, 2.6492),
    "SWAT 6:6": Variant(True, "sigmoid", "6:6", False, 2.7275),
    "SWAT 6:6, RoPE": Variant(True, "sigmoid", "6:6", True, 2.5099),
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained. Lengths and the window in tokens, which are bytes.

    chunks: held-out pieces of 16 training lengths that are read, each from the start of another document.
    """

    hidden: int
    layers: int
    length: int
    window: int
    batch: int
    steps: int
    learning_rate: float
    chunks: int

    @property
    def tokens(self) -> int:
        """Count the tokens that one run trains on."""
        return self.length * self.batch * self.steps


SIZES = {
    "tiny": Size(hidden=24, layers=1, length=16, window=4, batch=2, steps=2, learning_rate=3e-3, chunks=2),
    "cpu": Size(hidden=96, layers=3, length=256, window=64, batch=16, steps=300, learning_rate=3e-3, chunks=20),
    "gpu": Size(hidden=384, layers=6, length=1024, window=256, batch=64, steps=300, learning_rate=1e-3, chunks=8),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One trained model.

    loss: bits per byte of one and the same held-out text, by the length of the rows in which it is read.
    by_position: bits per byte of the longest rows, by sixteenths of them.
    """

    variant: str
    seed: int
    parameters: int
    loss: dict[int, float]
    by_position: list[float]
    seconds: float


def train_and_read(variant: str, size: Size, seed: int, corpus: Corpus, device: torch.device) -> Run:
    """Train one model and read held-out text with it.

    A seed draws the same rows in the same order and the same first parameters, whatever the variant.
    """
    began = time.perf_counter()
    training = TrainingConfig(
        steps=size.steps, length=size.length, batch=size.batch, learning_rate=size.learning_rate, seed=seed,
        eval_every=size.steps, eval_tokens=size.length * size.batch, save_every=size.steps,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model_of(VARIANTS[variant], size), training, corpus, Path(folder), ranks=Ranks(device))
        trainer.run()
    losses = {times * size.length: read(trainer.model, corpus, size, times) for times in MULTIPLES}
    longest = losses[MULTIPLES[-1] * size.length].reshape(size.chunks, 16, -1)
    return Run(
        variant=variant,
        seed=seed,
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        loss={length: float(bits.mean()) for length, bits in losses.items()},
        by_position=longest.mean((0, 2)).tolist(),
        seconds=time.perf_counter() - began,
    )


def model_of(variant: Variant, size: Size) -> SwatConfig:
    """Twelve heads, as in the paper's ablations. All variants have the same parameters."""
    return SwatConfig(
        vocab_size=VOCAB,
        hidden_size=size.hidden,
        layers=size.layers,
        heads=12,
        window=size.window if variant.sliding else None,
        activation="softmax" if variant.activation == "softmax" else "sigmoid",
        slopes=variant.slopes,
        rope=variant.rope,
        tie_embeddings=True,
    )


def read(model: SwatTransformer, corpus: Corpus, size: Size, times: int) -> Tensor:
    """Bits `[chunks, 16·length]` of every token of the held-out chunks, read in rows of `times` training lengths.

    The tokens are the same at every length: only how far back a row reaches differs.
    """
    longest = MULTIPLES[-1] * size.length
    starts = chunks(corpus.held_out, longest, size.chunks)
    device = next(model.parameters()).device
    bits = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for start in starts:
            batch = rows(corpus.held_out, list(range(start, start + longest, times * size.length)), times * size.length)
            tokens, targets, _ = batch.to(device)
            logits = model(tokens).float()
            bits.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none") / math.log(2))
    return torch.stack(bits).double().cpu()


def chunks(stream: Tensor, length: int, count: int) -> list[int]:
    """Starts of the first `count` documents that are longer than `length` tokens.

    Raises:
        ValueError: fewer documents are.
    """
    packed = torch.where(stream == 0, SEPARATOR, stream.long())
    borders = torch.cat(((packed == SEPARATOR).nonzero()[:, 0], torch.tensor([len(stream)])))
    starts = borders[:-1][borders.diff() > length][:count].tolist()
    if len(starts) < count:
        raise ValueError(f"held-out text: expected {count} documents of over {length} bytes, got {len(starts)}")
    return starts
