"""`Trainer`: the loop, its evaluation, its checkpoints."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from swat_flex.nn import SwatConfig, SwatTransformer
from swat_flex.training import parallel
from swat_flex.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from swat_flex.training.config import TrainingConfig
from swat_flex.training.data import SEPARATOR, Corpus, Sampler, rows
from swat_flex.training.parallel import Ranks

REPORT_SECONDS = 0.25  # reading a loss waits for the device, so not at every step


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is. loss: mean over the tokens since the last report, nats; share: of the run, 0 to 1."""

    step: int
    share: float
    loss: float
    tokens_per_second: float
    seconds_left: float
    learning_rate: float

    @property
    def bits(self) -> float:
        """Training loss in bits per token: per byte, except that separators between documents count as tokens."""
        return self.loss / math.log(2)


class Listener(Protocol):
    """Receiver of what a run tells, on the first rank."""

    def progress(self, progress: Progress) -> None: ...

    def evaluated(self, step: int, bits_per_byte: float) -> None: ...

    def saved(self, path: Path) -> None: ...


class Trainer:
    """Trainer of a byte-level model. A run depends on its arguments alone; one resumed repeats to the bit.

    Args:
        model: its configuration; the weights are drawn from the training's seed.
        training: see `TrainingConfig`.
        corpus: from `read_corpus`.
        folder: of the checkpoints.
        ranks: from `parallel.start`.
        compiled: run blocks through torch.compile.
    """

    def __init__(
        self,
        model: SwatConfig,
        training: TrainingConfig,
        corpus: Corpus,
        folder: Path,
        *,
        ranks: Ranks | None = None,
        compiled: bool = False,
    ) -> None:
        self.ranks = Ranks(torch.device("cpu")) if ranks is None else ranks
        self.training, self.corpus, self.folder = training, corpus, folder
        self.sampler = Sampler(
            corpus.train, training.length, training.batch, training.seed, self.ranks.rank, self.ranks.size
        )
        if len(corpus.held_out) < 2:
            raise ValueError(f"corpus: expected held-out text, got {len(corpus.held_out)} bytes of it")
        torch.manual_seed(training.seed)
        self.model = SwatTransformer(model).to(self.ranks.device)
        self.model.gradient_checkpointing = training.gradient_checkpointing
        if compiled:
            for block in self.model.blocks:
                block.compile()
        parallel.shard(self.model, self.ranks)
        self.optimizer = _optimizer(self.model, training, self.ranks.device)
        self.step, self.seconds, self.stopping = 0, 0.0, False
        self.evaluated: tuple[int, float] | None = None  # the last evaluation: after which step, bits per byte
        self._began = 0.0  # on perf_counter's clock, less the seconds of the runs before

    def stop(self) -> None:
        """End after the step that runs, with a checkpoint; safe in a signal handler."""
        self.stopping = True

    def run(self, listener: Listener | None = None, until: int | None = None) -> None:
        """Train to the end, or to step `until`, and save.

        Raises:
            FloatingPointError: a loss that is not finite; the checkpoints stay as they were.
        """
        self._began = time.perf_counter() - self.seconds
        window = _Window()
        while True:
            self.seconds, stopping = self.ranks.agree(time.perf_counter() - self._began, float(self.stopping))
            share = self.training.progress(self.step, self.seconds)
            if share >= 1 or stopping or self.step == until:
                break
            window.add(self._train_step(self.training.rate(self.step, share)))
            window.report(self, listener)
            paused = time.perf_counter()
            if self.step % self.training.eval_every == 0:
                self._evaluate_and_tell(listener)
            if self.step % self.training.save_every == 0:
                self._save_and_tell(listener, window)
            window.since += time.perf_counter() - paused
        if self.step % self.training.eval_every:
            self._evaluate_and_tell(listener)
        if self.step % self.training.save_every:
            self._save_and_tell(listener, window)

    def _train_step(self, rate: float) -> Tensor:
        """Train one step. Returns the mean loss of all its rows, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.ranks.part(self.sampler(self.step))
        with self._autocast():
            loss = self.model.loss(*batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return self.ranks.mean(loss.detach())

    def _autocast(self) -> AbstractContextManager[Any]:
        cuda = self.ranks.device.type == "cuda"
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=cuda)

    def evaluate(self) -> float:
        """Bits per byte of held-out text: rows spread evenly over it, each read from its own start.

        Separators are predicted too and their cost is counted; the bytes alone divide it.
        """
        stream, length = self.corpus.held_out, min(self.training.length, len(self.corpus.held_out) - 1)
        per_rank = max(1, self.training.batch // self.ranks.size)
        count = max(1, self.training.eval_tokens // (length * self.training.batch)) * self.training.batch
        starts = [(len(stream) - length) * i // count for i in range(count)][self.ranks.rank :: self.ranks.size]
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self._autocast():
            for first in range(0, len(starts), per_rank):
                batch = rows(stream, starts[first : first + per_rank], length)
                loss = self.model.loss(*self.ranks.part(batch))
                sums += torch.tensor([loss.item() * batch.targets.numel(), (batch.targets != SEPARATOR).sum()])
        nats, size = self.ranks.sum(sums.to(self.ranks.device, torch.float32)).tolist()
        return float(nats / math.log(2) / size)

    def save(self) -> Path:
        """Write a checkpoint; every rank must call."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict  # seconds of import

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=whole)
        text = self.corpus
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "evaluated": self.evaluated,
            "model_config": self.model.config.to_dict(),
            "training_config": self.training.to_dict(),
            "corpus": {"fingerprint": text.fingerprint, "folder": text.folder, "pattern": text.pattern},
            "model": model,
            "optimizer": optimizer,
        }
        if self.ranks.first:
            return save_checkpoint(self.folder, state)
        return self.folder

    def resume(self, state: dict[str, Any] | None = None) -> None:
        """Go on from the folder's newest checkpoint, as if never interrupted, on any number of ranks.

        Args:
            state: that checkpoint, where it has been loaded already.

        Raises:
            FileNotFoundError, CheckpointError: none there, damaged, or of another run; names what differs.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict  # seconds of import

        state = load_checkpoint(self.folder) if state is None else state
        self._check(state)
        whole = StateDictOptions(full_state_dict=True)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=whole,
        )
        self.step, self.seconds, self.evaluated = state["step"], state["seconds"], state.get("evaluated")

    def _check(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint is of this run; its end and its intervals may differ."""
        free = {"steps", "minutes", "eval_every", "eval_tokens", "save_every", "gradient_checkpointing"}
        model = SwatConfig.from_dict(state["model_config"])
        for kept, mine in (
            (model.to_dict(), self.model.config.to_dict()),
            (state["training_config"], self.training.to_dict()),
        ):
            for name, value in mine.items():
                saved = kept.get(name)
                if name not in free and saved != value:
                    raise CheckpointError(
                        f"{name}: expected {saved!r}, with which the checkpoint was made, got {value!r}"
                    )
        theirs, ours = state["corpus"]["fingerprint"], self.corpus.fingerprint
        if theirs != ours:
            folder = self.corpus.folder or "the standard library"
            raise CheckpointError(
                f"corpus: expected the text the checkpoint was trained on (sha256 {theirs[:12]}…), got {folder!r} "
                f"(sha256 {ours[:12]}…)"
            )

    def _evaluate_and_tell(self, listener: Listener | None) -> None:
        bits = self.evaluate()
        self.evaluated = (self.step, bits)
        if listener is not None and self.ranks.first:
            listener.evaluated(self.step, bits)

    def _save_and_tell(self, listener: Listener | None, window: _Window) -> None:
        window.check(self.step)
        self.seconds = time.perf_counter() - self._began
        path = self.save()
        if listener is not None and self.ranks.first:
            listener.saved(path)


class _Window:
    """Losses since the last report."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.last: Tensor | None = None
        self.since = time.perf_counter()  # less what evaluations and checkpoints took

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss)
        self.last = loss

    def report(self, trainer: Trainer, listener: Listener | None) -> None:
        """Tell the listener the mean loss and the speed, at most every REPORT_SECONDS."""
        now = time.perf_counter()
        if now - self.since < REPORT_SECONDS:
            return
        loss = torch.stack(self.losses).mean().item()
        if not math.isfinite(loss):
            raise _not_finite(trainer.step, loss)
        training, speed = trainer.training, len(self.losses) / (now - self.since)
        share = training.progress(trainer.step, trainer.seconds)
        left = math.inf
        if training.steps is not None:
            left = (training.steps - trainer.step) / speed
        if training.minutes is not None:
            left = min(left, 60 * training.minutes - trainer.seconds)
        if listener is not None and trainer.ranks.first:
            tokens = speed * training.batch * training.length
            rate = trainer.optimizer.param_groups[0]["lr"]
            listener.progress(Progress(trainer.step, share, loss, tokens, max(left, 0.0), rate))
        self.losses, self.since = [], now

    def check(self, step: int) -> None:
        """Refuse to save weights whose last loss was not finite: they would replace good ones."""
        if self.last is not None and not math.isfinite(self.last.item()):
            raise _not_finite(step, self.last.item())


def _not_finite(step: int, loss: float) -> FloatingPointError:
    return FloatingPointError(
        f"loss: expected a finite number, got {loss} at step {step}; a lower learning rate may help, and the last "
        "checkpoint is as it was"
    )


def _optimizer(model: SwatTransformer, training: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """Make an AdamW under which norms, slopes and biases do not decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=training.learning_rate, betas=(training.beta1, training.beta2), fused=device.type in ("cuda", "cpu")
    )


def load_model(path: Path, device: torch.device | str = "cpu") -> SwatTransformer:
    """The model of a checkpoint, or of a folder's newest.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`.
    """
    return model_of(load_checkpoint(path)).to(device)


def model_of(state: dict[str, Any]) -> SwatTransformer:
    """The model of a loaded checkpoint."""
    model = SwatTransformer(SwatConfig.from_dict(state["model_config"]))
    model.load_state_dict(state["model"], strict=True)
    return model
