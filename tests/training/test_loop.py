"""The loop: it learns, resumes to the bit, refuses what does not fit."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from swat_flex.training import SIZES, CheckpointError, Corpus, Trainer, TrainingConfig, load_checkpoint, load_model

MODEL = SIZES["tiny"].model
BASE = TrainingConfig(steps=10, length=48, batch=3, warmup=3, eval_every=4, eval_tokens=300, save_every=5)


class Ear:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.evaluations: list[tuple[int, float]] = []
        self.steps: list[int] = []

    def progress(self, progress: Any) -> None:
        self.steps.append(progress.step)

    def evaluated(self, step: int, bits_per_byte: float) -> None:
        self.evaluations.append((step, bits_per_byte))

    def saved(self, path: Any) -> None:
        assert load_checkpoint(path)


def states_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return bool(a == b)


def trained(corpus: Corpus, folder: Any, until: int | None = None, resume: bool = False, **options: Any) -> Trainer:
    trainer = Trainer(MODEL, replace(BASE, **options), corpus, folder)
    if resume:
        trainer.resume()
    trainer.run(until=until)
    return trainer


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_resumed_run_is_the_straight_one_to_the_bit(corpus, tmp_path, stop):
    trained(corpus, tmp_path / "straight")
    trained(corpus, tmp_path / "parts", until=stop)
    trained(corpus, tmp_path / "parts", resume=True)
    straight, parts = (load_checkpoint(tmp_path / name) for name in ("straight", "parts"))
    assert straight["step"] == parts["step"] == 10
    assert states_equal(straight["model"], parts["model"])
    assert states_equal(straight["optimizer"]["state"], parts["optimizer"]["state"])


def test_it_learns_and_tells(corpus, tmp_path):
    ear = Ear()
    trainer = Trainer(MODEL, replace(BASE, steps=60, eval_every=25, learning_rate=1e-2), corpus, tmp_path)
    before = trainer.evaluate()
    trainer.run(ear)
    assert [step for step, _ in ear.evaluations] == [25, 50, 60]
    assert abs(before - math.log2(264)) < 1
    assert ear.evaluations[-1][1] < before - 3
    assert ear.evaluations[-1][1] == pytest.approx(trainer.evaluate(), abs=1e-6)
    model = load_model(tmp_path)
    assert states_equal(dict(model.state_dict()), dict(trainer.model.state_dict()))


def test_bits_per_byte_are_those_of_the_held_out_text(corpus, tmp_path):
    """All of it in one row of its own: Σ −log2 p over its bytes."""
    size = len(corpus.held_out)
    trainer = Trainer(MODEL, replace(BASE, length=size - 1, batch=1, eval_tokens=1), corpus, tmp_path)
    tokens = torch.where(corpus.held_out == 0, 256, corpus.held_out.long())[None]
    ids = (tokens[:, :-1] == 256).cumsum(1)
    logits = trainer.model(tokens[:, :-1], ids)
    p = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
    byte_targets = (tokens[:, 1:] != 256).sum()
    assert trainer.evaluate() == pytest.approx(-(p.sum() / math.log(2) / byte_targets).item(), rel=1e-5)


def test_only_matrices_decay(corpus, tmp_path):
    model = replace(MODEL, learnable_slopes=True, qk_norm=True, learnable_logit_bias=True)
    trainer = Trainer(model, BASE, corpus, tmp_path)
    decayed, kept = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in kept["params"]} == {1}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(trainer.model.parameters()))


def test_the_rate_warms_up_and_falls_to_a_tenth():
    training = replace(BASE, steps=1000, warmup=9, learning_rate=1.0)
    rates = [training.rate(step, training.progress(step, 0.0)) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9], abs=1e-3)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[500] == pytest.approx(0.55)
    assert rates[1000] == pytest.approx(0.1)
    timed = replace(BASE, steps=None, minutes=2.0)
    assert timed.progress(10**9, 60.0) == 0.5
    assert timed.progress(0, 1e9) == 1.0


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"seed": 1}, ["seed", "expected 0", "got 1"]),
        ({"batch": 6}, ["batch", "expected 3", "got 6"]),
        ({"learning_rate": 1.0}, ["learning_rate", "got 1.0"]),
    ],
)
def test_another_runs_checkpoint_is_refused_and_kept(corpus, tmp_path, change, parts):
    trained(corpus, tmp_path, until=2)
    before = load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        trained(corpus, tmp_path, resume=True, **change)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert states_equal(load_checkpoint(tmp_path), before)


def test_another_model_or_text_is_refused(corpus, tmp_path):
    trained(corpus, tmp_path, until=1)
    with pytest.raises(CheckpointError, match=r"window: expected 16, .* got 17"):
        Trainer(replace(MODEL, window=17), BASE, corpus, tmp_path).resume()
    with pytest.raises(CheckpointError, match="corpus: expected the text the checkpoint was trained on"):
        Trainer(MODEL, BASE, replace(corpus, fingerprint="0" * 64), tmp_path).resume()


def test_a_longer_run_may_go_on(corpus, tmp_path):
    trained(corpus, tmp_path, steps=4)
    assert trained(corpus, tmp_path, resume=True, steps=7, save_every=2).step == 7


def test_a_lost_loss_ends_the_run_and_keeps_the_checkpoint(corpus, tmp_path):
    trained(corpus, tmp_path, until=4)
    trainer = Trainer(MODEL, BASE, corpus, tmp_path)
    trainer.resume()
    with torch.no_grad():
        trainer.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="loss: expected a finite number, got nan at step"):
        trainer.run()
    assert load_checkpoint(tmp_path)["step"] == 4


def test_stop_saves_at_the_end_of_the_step(corpus, tmp_path):
    trainer = Trainer(MODEL, BASE, corpus, tmp_path)
    trainer.run(until=2)
    trainer.stop()
    trainer.run()
    assert load_checkpoint(tmp_path)["step"] == 2


def test_gradient_checkpointing_trains_the_same(corpus, tmp_path):
    plain = trained(corpus, tmp_path / "a", steps=3)
    thrifty = trained(corpus, tmp_path / "b", steps=3, gradient_checkpointing=True)
    assert states_equal(dict(plain.model.state_dict()), dict(thrifty.model.state_dict()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": None}, "steps: expected a number of steps, or minutes, got None for both"),
        ({"length": 0}, "length: expected at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate: expected a positive number, got -1.0"),
        ({"minutes": math.inf}, "minutes: expected a positive number, got inf"),
        ({"weight_decay": -0.1}, "weight_decay: expected at least 0, got -0.1"),
    ],
)
def test_a_wrong_setting_is_refused(options, message):
    with pytest.raises(ValueError, match="expected") as caught:
        replace(BASE, **options)
    assert str(caught.value) == message


def test_text_shorter_than_a_row_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="length: expected fewer tokens than the training text has"):
        Trainer(MODEL, replace(BASE, length=10**6), corpus, tmp_path)
