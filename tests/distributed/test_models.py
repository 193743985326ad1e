"""`SwatTransformer` and its training on meshes (data, context) against one process."""

import functools
import subprocess
import sys

import models
import pytest
import torch
from ranks import run
from typer.testing import CliRunner

from swat_flex.cli import app
from swat_flex.testing.budget import ENOUGH, assert_within_budget
from swat_flex.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.xdist_group("processes")

MESHES = [(1, 2), (1, 3), (2, 2)]


@functools.cache
def alone(dtype):
    return models.alone(dtype)


@pytest.mark.parametrize(("data", "context"), MESHES)
def test_loss_and_gradients_are_those_of_one_process(data, context):
    for found in run(models.model_on, data * context, torch.float64, data, context, context == 3, False):
        assert found.keys() == alone(torch.float64).keys()
        for name, expected in alone(torch.float64).items():
            assert (found[name] - expected).abs().max() <= 1e-12 * max(expected.abs().max(), 1), name


def test_float32_is_within_budget_of_float64():
    exact, rough = alone(torch.float64), alone(torch.float32)
    for found in run(models.model_on, 4, torch.float32, 2, 2, False, False):
        for name, expected in exact.items():
            if expected.numel() >= ENOUGH:
                assert_within_budget(found[name], exact=expected, rough=rough[name], name=name)


def test_compiled_blocks_break_their_graph_at_the_exchange_and_agree():
    for found in run(models.model_on, 2, torch.float64, 1, 2, False, True):
        for name, expected in alone(torch.float64).items():
            assert (found[name] - expected).abs().max() <= 1e-12 * max(expected.abs().max(), 1), name


def test_logits_are_those_of_one_process_and_ranks_that_differ_are_told():
    tokens, _, ids = models.rows()
    expected = models.model_of(torch.float64)(tokens, ids)
    logits, errors = zip(*run(models.logits_on, 3), strict=True)
    assert (torch.cat(logits, 1) - expected).abs().max() <= 1e-12
    assert set(errors) == {"batch: expected the same on every rank of the mesh, got [3, 4, 4]"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Twenty documents."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(20):
        (folder / f"{i}.txt").write_text("".join(f"line {j} of document {i}\n" for j in range(20 + 7 * i)))
    return str(folder)


@pytest.fixture(scope="module")
def straight(texts, tmp_path_factory):
    """Losses and evaluations of one process, 50 steps."""
    return models.trained(0, texts, tmp_path_factory.mktemp("straight"))


def follows(losses, expected):
    """Within a few roundings of the loss, which float32 holds, at every step."""
    return (losses - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize(("ranks", "context"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_fifty_steps_follow_one_process(texts, straight, tmp_path, ranks, context):
    expected, evaluations = straight
    of_ranks = run(models.trained, ranks, texts, str(tmp_path), context)
    for losses, _ in of_ranks:
        assert follows(losses, expected)
    assert of_ranks[0][1] == pytest.approx(evaluations, rel=1e-6)


@pytest.mark.slow
def test_fifty_steps_of_the_small_model_follow_one_process(texts, tmp_path):
    """In float64 as rounding allows; in float32, where training magnifies it, no farther than one process strays."""

    def curve(context, dtype):
        arguments = (texts, str(tmp_path / f"{context} {dtype}"), context, "small", dtype)
        if context == 1:
            return models.trained(0, *arguments)[0].double()
        return run(models.trained, context, *arguments, seconds=1800)[0][0].double()

    exact = curve(1, torch.float64)
    shared, alone, rough = curve(2, torch.float64), curve(1, torch.float32), curve(2, torch.float32)
    far, strayed, apart = ((x - exact).abs().max() for x in (shared, alone, rough))
    print(f"from one process in float64: two {far:.3g}; in float32 one {strayed:.3g}, two {apart:.3g}")
    assert far < 1e-10
    assert apart < 2 * strayed


@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 1)), pytest.param((1, 1), (3, 3), marks=pytest.mark.slow)])
def test_training_resumes_on_another_number_of_processes(texts, straight, tmp_path, before, after):
    expected, _ = straight
    parts = []
    for (ranks, context), until in ((before, 20), (after, None)):
        arguments = (texts, str(tmp_path), context, "tiny", torch.float32, until, until is None)
        parts += run(models.trained, ranks, *arguments)[:1] if ranks > 1 else [models.trained(0, *arguments)]
    assert [len(losses) for losses, _ in parts] == [20, 30]
    assert follows(torch.cat([losses for losses, _ in parts]), expected)


@pytest.mark.slow  # two processes under torchrun are in tests/training too
def test_the_command_trains_under_torchrun(texts, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "swat_flex", "train",
        texts, "--out", str(tmp_path), "--size", "tiny", "--device", "cpu", "--steps", "4", "--context-parallel", "2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 steps in") == 1
    assert load_checkpoint(tmp_path)["step"] == 4


def test_the_command_refuses_a_context_that_does_not_divide_the_processes(texts, tmp_path):
    arguments = ["train", texts, "--out", str(tmp_path), "--size", "tiny", "--steps", "4", "--context-parallel", "2"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "context_parallel: expected a divisor of the 1 processes (of torchrun), got 2" in refused.output
