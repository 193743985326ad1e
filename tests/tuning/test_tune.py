"""Searches on this CPU: small problems, timed by a clock that takes no time; one search with a real one."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import autotune
from autotune import Store, StoreWarning
from swat_flex import explain, flex_swat, naive_swat, tune, tuned
from swat_flex.backends.banded import BandedConfig, op, tiles
from swat_flex.backends.cpp import library
from swat_flex.cli import app
from swat_flex.dispatch import BACKEND, BackendConfig
from swat_flex.problem import Problem
from swat_flex.tuning import plan as planning
from swat_flex.tuning import search as searching
from swat_flex.tuning import tasks
from swat_flex.tuning.plan import jobs_of, plan
from swat_flex.tuning.tasks import Job, SwatTask

command_file = importlib.import_module("swat_flex.cli.tune")  # the module, which the function hides

FEW = {"block": (32, 48, 80), "tile": (2**20,), "segment": (16,)}
PROBLEM = dataclasses.replace(Problem.of_self_attention(2, 200, 16, torch.float32, "cpu", 64), needs_grad=False)
ON_CPU = "banded" if library.trouble() else "cpp"
SHAPE = ("--shape", "1,2,2,200,16", "--window", "64")


class Scripted:
    """A clock by which every call takes a millisecond, whatever else the machine does."""

    name = "scripted"

    def sampler(self, run):
        run()
        return lambda: 1.0

    def probe(self):
        pass


@pytest.fixture
def few(monkeypatch):
    """Four blocks to choose from, one of which is the default; a search ends when it has tried them."""
    monkeypatch.setattr(tasks, "clock_for", lambda device: Scripted())
    monkeypatch.setattr(planning, "_call_seconds", lambda job, seconds: 1e-3)
    monkeypatch.setattr(searching, "search", functools.partial(autotune.search, now=lambda: 0.0))
    few_blocks(monkeypatch)


def few_blocks(monkeypatch):
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(op, name, dataclasses.replace(getattr(op, name), choices=lambda problem: FEW))


def qkv(length=200, **options):
    return [torch.randn(1, 2, length, 16, **options) for _ in range(3)]


def command(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments])


def told_by_a_new_process():
    program = (
        "import torch; from swat_flex import explain\n"
        "print(explain(*torch.randn(3, 1, 2, 200, 16), 64, backend='banded'))"
    )
    return subprocess.check_output([sys.executable, "-c", program], text=True, env=os.environ)


def test_what_was_measured_is_kept_and_a_new_process_uses_it(measured, monkeypatch):
    """The one search by a real clock."""
    few_blocks(monkeypatch)
    found = tune(*qkv(), 64, backend="banded", seconds=50)  # it ends when all four were tried
    (outcome,) = found.outcomes
    assert outcome.saved
    assert outcome.name == "banded.forward"
    assert len(outcome.result.timings) == 4
    assert outcome.result.failures == {}
    assert outcome.winner.median_ms <= outcome.default.median_ms
    digest = outcome.entry.key.digest[:8]
    assert digest in str(explain(*qkv(), 64, backend="banded"))  # this process has looked it up before
    told = told_by_a_new_process()
    assert f"user cache, entry banded.forward {digest}" in told
    assert str(outcome.result.winner) in told
    assert str(measured) in str(found)


def test_the_backward_is_tuned_where_the_call_needs_one(few):
    q, k, v = qkv(requires_grad=True)
    names = ["banded.forward", "banded.backward"]
    assert [outcome.name for outcome in tune(q, k, v, 64, backend="banded", seconds=20).outcomes] == names
    assert [outcome.name for outcome in tune(*qkv(), 64, backend="banded", seconds=20, backward=True).outcomes] == names
    assert [
        outcome.name for outcome in tune(q, k, v, 64, backend="banded", seconds=20, backward=False).outcomes
    ] == names[:1]


def test_a_wrong_configuration_never_wins(monkeypatch, few):
    """It skips its work and so is the fastest by far."""
    weights = tiles.Band.weights

    def wrong(band, q, k, group, rows, keys):
        if band.block == 32:
            return band.buffer("weights", q.shape[0], q.shape[1], k.shape[1]).fill_(0.5)
        return weights(band, q, k, group, rows, keys)

    monkeypatch.setattr(tiles.Band, "weights", wrong)
    for outcome in tune(*qkv(), 64, backend="banded", seconds=20, backward=True).outcomes:
        assert {config.block: failure.kind for config, failure in outcome.result.failures.items()} == {32: "wrong"}
        assert outcome.result.winner.block != 32
        assert outcome.saved


def test_documents_are_tuned_with_the_callers_own(few):
    ids = torch.arange(200) // 30
    (outcome,) = tune(*qkv(), 64, backend="banded", document_ids=ids, slopes=None, logit_bias=-1.0, seconds=20).outcomes
    assert outcome.saved
    assert outcome.entry.key.bucket["documents"]
    told = explain(*qkv(), 64, backend="banded", document_ids=ids, slopes=None, logit_bias=torch.zeros(2))
    assert outcome.entry.key.digest[:8] in str(told)


def test_a_disk_that_cannot_be_written_leaves_the_winner_in_memory(tmp_path, monkeypatch, few):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("AUTOTUNE_DIR", str(blocked / "folder"))
    tuned.store.cache_clear()
    q, k, v = qkv()
    with pytest.warns(StoreWarning, match="cannot be written"):
        found = tune(q, k, v, 64, backend="banded", seconds=20)
    assert not found.outcomes[0].saved
    assert "for this process only" in str(found)
    assert found.outcomes[0].entry.key.digest[:8] in str(explain(q, k, v, 64, backend="banded"))
    torch.testing.assert_close(flex_swat(q, k, v, 64, backend="banded"), naive_swat(q, k, v, 64), atol=1e-4, rtol=1e-4)


@pytest.mark.slow  # compiles two of flex's programs
def test_backends_are_raced_with_one_check_for_all():
    """flex's program is compiled here; its results are held to the same rule."""
    task = SwatTask(Job(BACKEND.name, "auto", PROBLEM, settings={"banded.forward": BandedConfig(32)}))
    for name in ("banded", "flex"):
        assert task.check(task.prepare(BackendConfig(name))()) is None


def test_flex_enters_where_there_is_time_for_its_compilation():
    assert [job.tunable for job in jobs_of(PROBLEM, "auto", seconds=100)] == [f"{ON_CPU}.forward", "backend"]
    assert [job.tunable for job in jobs_of(PROBLEM, "auto", seconds=10)] == [f"{ON_CPU}.forward"]


def test_what_would_take_too_long_is_left_out_and_says_so():
    huge = dataclasses.replace(PROBLEM, q_len=2**20, kv_len=2**20)
    (item,) = plan(jobs_of(huge, "auto", 1.0), 1.0)
    assert item.candidates == 0
    assert "a comparison" in item.refusal


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"seconds": 0}, ValueError, "seconds: expected a positive number, got 0"),
        ({"seconds": "10"}, TypeError, "seconds: expected a number, got str"),
        ({"activation": "tanh-sigmoid"}, ValueError, "tune: expected 'sigmoid' or 'softmax'"),
        ({"backend": "triton"}, NotImplementedError, "backend='triton'"),
        ({"backend": "flex"}, ValueError, "backend: expected one that has something to tune on cpu, got 'flex'"),
        ({"backend": "naive"}, ValueError, "backend: expected .* got 'naive'"),
        ({"window": 0}, ValueError, "window"),
    ],
)
def test_wrong_arguments_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        tune(*qkv(), **{"window": 64, **options})


def test_the_command_plans_measures_and_says_where_it_saved(measured, few):
    result = command(
        *SHAPE, "--shape", "1,2,1,100,16", "--dtype", "bf16", "--seconds", "30", "--backward", "--backend", "banded"
    )
    assert result.exit_code == 0, result.output
    for part in ("plan", "4 of 4", "banded.backward", "B1 H2/1 L100 D16", "bfloat16", "speed-up", "4 saved in"):
        assert part in result.output
    assert sum(1 for _ in Store(measured).entries()) == 4


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), ("--shape", "neither")),
        (("--shape", "1,2,3"), ("--shape", "B,Hq,Hkv,L,D", "'1,2,3'")),
        (("--shape", "1,3,2,64,16"), ("multiple of Hkv", "'1,3,2,64,16'")),
        ((*SHAPE, "--dtype", "fp8"), ("--dtype", "bf16", "'fp8'")),
        ((*SHAPE, "--window", "0"), ("--window", "'0'")),
        ((*SHAPE, "--seconds", "0"), ("--seconds", "positive")),
        ((*SHAPE, "--backend", "naive"), ("--backend", "banded", "'naive'")),
        ((*SHAPE, "--backend", "triton"), ("--backend", "need a GPU")),
        ((*SHAPE, "--device", "cuda:9"), ("--device", "'cuda:9'")),
        (("--preset", "decode", "--backend", "triton"), ("--backend", "need a GPU")),
        (("--preset", "decode", "--backend", "flex"), ("--backend", "'flex'")),
        (("--preset", "train-9b"), ("--preset", "train-7b", "'train-9b'")),
    ],
)
def test_the_command_refuses_in_one_line(arguments, parts):
    result = command(*arguments)
    assert result.exit_code == 2
    assert all(part in result.output for part in parts), result.output


def test_a_preset_that_is_too_much_for_this_machine_says_so(measured, monkeypatch):
    monkeypatch.setattr("swat_flex.cli.machine.memory", lambda device: 2**50)
    result = command("--preset", "train-7b", "--seconds", "5")
    assert result.exit_code == 1
    assert f"left out: {ON_CPU}.forward, B4 H32 L4,096 D128" in result.output
    assert "Nothing to tune" in result.output
    assert not measured.exists()


def test_the_decode_preset_says_what_it_needs(measured):
    result = command("--preset", "decode", "--seconds", "5")
    assert result.exit_code == 1
    told = " ".join(result.output.split())
    assert "left out: triton.decode, B1 H32/8 L1 of 1,024 D128 window 1024 bfloat16: " in told
    assert "the kernels need a GPU, got cpu; what decodes here has nothing to tune" in told
    assert "Nothing to tune" in told
    assert not measured.exists()


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch):
    monkeypatch.setattr("swat_flex.cli.machine.memory", lambda device: 2**20)
    result = command("--shape", "1,8,8,4096,64")
    assert result.exit_code == 1
    assert "GiB" in result.output


def test_ctrl_c_keeps_what_was_measured(measured, monkeypatch, few):
    follow, seen = command_file._Screen.follow, []

    def interrupt(screen, item, event):
        follow(screen, item, event)
        seen.append(event.kind)
        if seen.count("measured") == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command_file._Screen, "follow", interrupt)
    result = command(*SHAPE, "--seconds", "30", "--backward", "--backend", "banded")
    assert result.exit_code == 130, result.output
    assert "1 saved in" in result.output
    assert "interrupted after" in result.output
    (entry,) = Store(measured).entries()
    assert entry.interrupted
    assert entry.key.tunable == "banded.forward"
    assert 1 <= len(entry.timings) <= 3


def test_an_interrupted_search_replaces_no_better_entry(measured, few):
    (outcome,) = tune(*qkv(), 64, backend="banded", seconds=20).outcomes
    from swat_flex.tuning.search import _keep

    slower = [(config, dataclasses.replace(timing, median_ms=1e6)) for config, timing in outcome.entry.timings]
    assert _keep(dataclasses.replace(outcome.entry, timings=slower, interrupted=True))
    (path,) = measured.glob("*.json")
    assert json.loads(path.read_text())["interrupted"] is False
