"""`swat-flex train` and `generate` as a user runs them: killed, resumed, on several processes, refused."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from swat_flex.cli import app
from swat_flex.nn import PAPER
from swat_flex.training import (
    SIZES,
    Trainer,
    TrainingConfig,
    load_checkpoint,
    load_model,
    read_corpus,
    save_checkpoint,
)
from swat_flex.training.checkpoint import checkpoints

pytestmark = pytest.mark.xdist_group("processes")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def tiny(folder, out, *more):
    return ["train", str(folder), "--out", str(out), "--size", "tiny", "--eval-every", "50", "--device", "cpu", *more]


def run(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(*arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("error: ")
    return line


def test_train_then_generate_then_resume(folder, tmp_path):
    out = tmp_path / "run"
    page = run(*tiny(folder, out, "--steps", "8", "--save-every", "4"))
    assert "20 documents" in page
    assert "step       8  held-out" in page
    text = run("generate", str(out), "--prompt", "line é", "--tokens", "30", "--seed", "1")
    assert text.startswith("line é")
    assert text == run("generate", str(checkpoints(out)[-1]), "--prompt", "line é", "--tokens", "30", "--seed", "1")
    assert "Goes on from step 8" in run("train", "--out", str(out), "--resume", "--steps", "9")
    assert load_checkpoint(out)["step"] == 9


def test_kill_9_loses_at_most_one_interval_and_no_bit(folder, tmp_path):
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "swat_flex", *tiny(folder, killed, "--minutes", "60", "--save-every", "3")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while len(checkpoints(killed)) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    step = load_checkpoint(killed)["step"]
    assert step % 3 == 0
    assert step >= 6
    run("train", "--out", str(killed), "--resume", "--steps", str(step + 2))
    assert load_checkpoint(killed)["step"] == step + 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_saves(folder, tmp_path, monkeypatch, number):
    """Sent from within the third step, so that no clock decides; a second one would end the program."""
    step, before = Trainer._train_step, signal.getsignal(number)

    def interrupted(trainer, rate):
        if trainer.step == 2:
            signal.raise_signal(number)
        return step(trainer, rate)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    run(*tiny(folder, tmp_path / "run", "--steps", "40000"))
    assert load_checkpoint(tmp_path / "run")["step"] == 3
    assert signal.getsignal(number) is before


def test_torchrun_shards_and_trains_the_same(folder, tmp_path):
    """Two processes, half the rows and half the weights each, go on from one process's checkpoint and back."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(*tiny(folder, one, "--steps", "2"))
    shutil.copytree(one, two)
    more = ["train", "--resume", "--steps", "4", "--out"]
    run(*more, str(one))
    pair = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "swat_flex"]
    subprocess.run([*pair, *more, str(two)], env=ENVIRONMENT, check=True, timeout=240)
    alone, shared = (load_checkpoint(path) for path in (one, two))
    assert alone["step"] == shared["step"] == 4
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, of_weight in alone["optimizer"]["state"].items():
            torch.testing.assert_close(shared["optimizer"]["state"][name][kind], of_weight[kind], atol=1e-5, rtol=1e-3)
    for name, x in alone["model"].items():
        torch.testing.assert_close(shared["model"][name], x, atol=2e-4, rtol=1e-3, msg=name)
    run("train", "--out", str(two), "--resume", "--steps", "5")


def test_a_run_begun_before_the_recipe_goes_on_as_it_was(folder, tmp_path):
    """It has the paper's attention, and neither assumed_length nor root_norm; a size given again is no other model."""
    out, tiny_model = tmp_path / "run", SIZES["tiny"].model
    old = Trainer(replace(tiny_model, **PAPER), TrainingConfig(steps=2, length=16, batch=2), read_corpus(folder), out)
    old.run()
    state = load_checkpoint(out)
    del state["model_config"]["assumed_length"], state["model_config"]["root_norm"], state["format"]
    save_checkpoint(out, state)
    for step, options in ((3, []), (4, ["--size", "tiny"])):
        run("train", "--out", str(out), "--resume", "--steps", str(step), *options)
        model = load_model(out)
        assert load_checkpoint(out)["step"] == step
        assert {name: getattr(model.config, name) for name in PAPER} == PAPER
    assert "hidden_size: expected 32" in refusal("train", "--out", str(out), "--resume", "--size", "small")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "no/such/folder"], ["folder", "'no/such/folder'"]),
        (["train", "--size", "huge"], ["--size", "tiny, small", "'huge'"]),
        (["train", "--steps", "0"], ["steps", "at least 1", "0"]),
        (["train", "--minutes", "-1"], ["minutes", "positive", "-1.0"]),
        (["train", "--device", "toaster"], ["--device", "'toaster'"]),
        (["generate", "no/such/run"], ["checkpoint", "'no/such/run'"]),
    ],
)
def test_a_wrong_value_gets_one_line(arguments, parts, tmp_path):
    more = ["--out", str(tmp_path / "run")] if arguments[0] == "train" else []
    line = refusal(*arguments, *more)
    assert all(part in line for part in parts), line


def test_runs_do_not_mix(folder, tmp_path):
    out = tmp_path / "run"
    assert "got none in" in refusal("train", "--out", str(tmp_path), "--resume")
    run(*tiny(folder, out, "--steps", "2"))
    assert "--out: expected a folder without checkpoints, or --resume" in refusal(*tiny(folder, out, "--steps", "2"))
    assert "seed: expected 0" in refusal("train", "--out", str(out), "--resume", "--seed", "1")
    (folder / "more.txt").write_text("more")
    assert "corpus: expected the text" in refusal("train", "--out", str(out), "--resume")
    path = checkpoints(out)[-1]
    path.write_bytes(path.read_bytes()[:-100])
    assert "expected a whole checkpoint" in refusal("generate", str(out))


def test_generate_refuses_wrong_sampling(folder, tmp_path):
    run(*tiny(folder, tmp_path / "run", "--steps", "1"))
    assert "top_p: expected 0 < top_p ≤ 1, got 2.0" in refusal("generate", str(tmp_path / "run"), "--top-p", "2")
    assert "max_new_tokens: expected at least 0, got -1" in refusal("generate", str(tmp_path / "run"), "--tokens", "-1")
