"""What is trained and how it is judged: the kinds of attention, the sizes, the texts, one run."""

from __future__ import annotations

import itertools
import math
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.quality.changes import CHANGES, Change
from perf.quality.softmax import softmax_by_sums
from swat_flex.nn import SwatAttention, SwatConfig, SwatTransformer
from swat_flex.training import Corpus, Progress, Trainer, TrainingConfig, read_corpus
from swat_flex.training.data import VOCAB, rows
from swat_flex.training.parallel import Ranks

MULTIPLES = (1, 4, 16)  # of the training length, at which the held-out text is read
EVALUATIONS = 6  # of a run, on the text for choosing


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of attention.

    paper: its loss in Table 3 (average over three texts), None for what is ours.
    unit: the unit bias; learnt: slopes and bias are parameters; norm: RMSNorm of queries and keys; root: the output
    divided by the root of its rms; change: what is tried on it.
    """

    sliding: bool
    activation: str
    slopes: str | None
    rope: bool
    paper: float | None = None
    unit: bool = False
    learnt: bool = False
    norm: bool = False
    root: bool = False
    change: Change | None = None


PAPER = {
    "full softmax, RoPE": Variant(False, "softmax", None, True, 5.5149),
    "full sigmoid, RoPE": Variant(False, "sigmoid", None, True, 10.5744),
    "sliding softmax, RoPE": Variant(True, "softmax", None, True, 4.9217),
    "SWAT 12:0": Variant(True, "sigmoid", "12:0", False, 2.6200),
    "SWAT 8:4": Variant(True, "sigmoid", "8:4", False, 2.6492),
    "SWAT 6:6": Variant(True, "sigmoid", "6:6", False, 2.7275),
    "SWAT 6:6, RoPE": Variant(True, "sigmoid", "6:6", True, 2.5099),
}
_SOFTMAX, _SWAT = "sliding softmax, RoPE, QK-norm, learnt ALiBi", "SWAT recipe"
RECIPE = {
    "sliding softmax, RoPE": PAPER["sliding softmax, RoPE"],
    "sliding softmax, RoPE, QK-norm": Variant(True, "softmax", None, True, norm=True),
    _SOFTMAX: Variant(True, "softmax", "alibi", True, learnt=True, norm=True),
    f"{_SOFTMAX}, root norm": Variant(True, "softmax", "alibi", True, learnt=True, norm=True, root=True),
    _SWAT: Variant(True, "sigmoid", "alibi", True, unit=True, learnt=True, norm=True, root=True),
    "SWAT recipe, no root norm": Variant(True, "sigmoid", "alibi", True, unit=True, learnt=True, norm=True),
    "SWAT recipe, no QK-norm": Variant(True, "sigmoid", "alibi", True, unit=True, learnt=True, root=True),
    "SWAT recipe, nothing learnt": Variant(True, "sigmoid", "alibi", True, unit=True, norm=True, root=True),
    "SWAT recipe, 6:6": Variant(True, "sigmoid", "6:6", True, unit=True, learnt=True, norm=True, root=True),
    "SWAT recipe, no RoPE": Variant(True, "sigmoid", "alibi", False, unit=True, learnt=True, norm=True, root=True),
}
TRIED = {
    f"{kind} + {name}": replace(RECIPE[kind], change=change)
    for name, change in CHANGES.items()
    for kind in ((_SOFTMAX, _SWAT) if change.of_both else (_SWAT,))
}
KINDS = {"paper": PAPER, "recipe": RECIPE, "tried": TRIED}
VARIANTS = PAPER | RECIPE | TRIED


@dataclass(frozen=True, slots=True)
class Size:
    """How much is trained. Lengths and the window in tokens, which are bytes.

    rates: peak learning rates of which each kind gets its best.
    warmup: steps to the peak.
    chunks: held-out pieces of 16 training lengths that are read.
    choosing: tokens of one evaluation on the text for choosing.
    """

    hidden: int
    layers: int
    length: int
    window: int
    batch: int
    steps: int
    rates: tuple[float, ...]
    chunks: int
    choosing: int = 32768
    warmup: int = 50

    @property
    def tokens(self) -> int:
        """Count the tokens that one run trains on."""
        return self.length * self.batch * self.steps


_RATES = (3e-3, 6e-3, 1e-2)
SIZES = {
    "tiny": Size(24, 1, length=16, window=4, batch=2, steps=2, rates=(3e-3, 6e-3), chunks=2, choosing=64),
    "cpu": Size(96, 3, length=256, window=64, batch=16, steps=300, rates=_RATES, chunks=20, warmup=100),
    "cpu-large": Size(192, 4, length=256, window=64, batch=16, steps=300, rates=_RATES, chunks=20, warmup=100),
    "gpu": Size(384, 6, length=1024, window=256, batch=64, steps=300, rates=(1e-3,), chunks=8, choosing=2**18),
}


@dataclass(frozen=True, slots=True)
class Text:
    """Text that this machine has, and under which licence."""

    name: str
    licence: str
    corpus: Corpus
    reported: Tensor

    @classmethod
    def of(cls, kind: str) -> Text:
        """ "code" is Python's standard library, "prose" Vim's help.

        Every twentieth training document becomes held_out, the text on which rates are chosen; what the corpus held out
        is for the report alone.

        Raises:
            FileNotFoundError: no Vim help here.
        """
        if kind == "code":
            name, licence, corpus = f"Python {platform.python_version()}'s standard library", "PSF-2.0", read_corpus()
        else:
            folders = sorted(Path("/usr/share/vim").glob("vim[0-9]*/doc"))
            if not folders:
                raise FileNotFoundError("text: expected Vim's help in /usr/share/vim (Debian: vim-runtime), got none")
            name, licence = f"Vim's help ({folders[-1].parent.name})", "OPL-1.0"
            corpus = read_corpus(folders[-1], "*.txt")
        is_chosen = ((corpus.train == 0).cumsum(0) % 20) == 10
        split = replace(corpus, train=corpus.train[~is_chosen], held_out=corpus.train[is_chosen])
        return cls(name, licence, split, corpus.held_out)


TEXTS = ("code", "prose")


@dataclass(frozen=True, slots=True)
class Run:
    """One trained model.

    loss: bits per byte of the reported text, by the length of the rows in which it is read.
    by_position: bits per byte of the longest rows, by sixteenths of them.
    curve: bits per byte of the text for choosing, by steps trained.
    """

    variant: str
    learning_rate: float
    seed: int
    parameters: int
    loss: dict[int, float]
    by_position: list[float]
    curve: dict[int, float]
    seconds: float


class _Curve:
    """A listener that keeps the evaluations."""

    def __init__(self) -> None:
        self.bits: dict[int, float] = {}

    def progress(self, progress: Progress) -> None:
        pass

    def evaluated(self, step: int, bits_per_byte: float) -> None:
        self.bits[step] = bits_per_byte

    def saved(self, path: Path) -> None:
        pass


def train_and_read(variant: str, rate: float, seed: int, size: Size, text: Text, device: torch.device) -> Run:
    """Train one model and read held-out text with it.

    A seed draws the same rows in the same order and the same first matrices, whatever the variant.
    """
    began = time.perf_counter()
    training = TrainingConfig(
        steps=size.steps, length=size.length, batch=size.batch, learning_rate=rate, warmup=size.warmup, seed=seed,
        eval_every=max(1, size.steps // EVALUATIONS), eval_tokens=size.choosing, save_every=size.steps,
    )  # fmt: skip
    curve = _Curve()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model_of(VARIANTS[variant], size), training, text.corpus, Path(folder), ranks=Ranks(device))
        if device.type == "cpu" and trainer.model.config.activation == "softmax":
            for layer in trainer.model.modules():
                if isinstance(layer, SwatAttention):
                    layer.attend = softmax_by_sums
        if (change := VARIANTS[variant].change) is not None:
            change.apply(trainer.model, trainer.optimizer)
        trainer.run(curve)
    losses = {times * size.length: read(trainer.model, text.reported, size, times) for times in MULTIPLES}
    longest = losses[MULTIPLES[-1] * size.length].reshape(size.chunks, 16, -1)
    return Run(
        variant=variant,
        learning_rate=rate,
        seed=seed,
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        loss={length: float(bits.mean()) for length, bits in losses.items()},
        by_position=longest.mean((0, 2)).tolist(),
        curve=curve.bits,
        seconds=time.perf_counter() - began,
    )


def model_of(variant: Variant, size: Size) -> SwatConfig:
    """Twelve heads, as in the paper's ablations. All variants have the same matrices."""
    return SwatConfig(
        vocab_size=VOCAB,
        hidden_size=size.hidden,
        layers=size.layers,
        heads=12,
        window=size.window if variant.sliding else None,
        activation="softmax" if variant.activation == "softmax" else "sigmoid",
        slopes=variant.slopes,
        learnable_slopes=variant.learnt,
        rope=variant.rope,
        qk_norm=variant.norm,
        root_norm=variant.root,
        logit_bias="unit" if variant.unit else None,
        learnable_logit_bias=variant.unit and variant.learnt,
        tie_embeddings=True,
    )


def read(model: SwatTransformer, stream: Tensor, size: Size, times: int) -> Tensor:
    """Bits `[chunks, 16·length]` of every token of the chunks of a packed stream, in rows of `times` training lengths.

    The tokens are the same at every length: only how far back a row reaches differs.
    """
    longest = MULTIPLES[-1] * size.length
    device = next(model.parameters()).device
    bits = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for start in chunks(stream, longest, size.chunks):
            batch = rows(stream, list(range(start, start + longest, times * size.length)), times * size.length)
            tokens, targets, _ = batch.to(device)
            logits = model(tokens).float()
            bits.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none") / math.log(2))
    return torch.stack(bits).double().cpu()


def chunks(stream: Tensor, length: int, count: int) -> list[int]:
    """Starts of `count` pieces of over `length` tokens, each within a document: first pieces first, then second ones.

    Raises:
        ValueError: there are fewer.
    """
    borders = torch.cat(((stream == 0).nonzero()[:, 0], torch.tensor([len(stream)]))).tolist()
    documents = list(itertools.pairwise(borders))
    deepest = max(end - start for start, end in documents) // length
    starts = [
        start + piece * length
        for piece in range(deepest)
        for start, end in documents
        if end - start > (piece + 1) * length
    ][:count]
    if len(starts) < count:
        raise ValueError(f"held-out text: expected {count} pieces of over {length} bytes, got {len(starts)}")
    return starts
