"""Measured configurations of the decode kernel: where they run and how tuning checks them, in Triton's interpreter; see
test_numerics.py, which starts this file."""

import dataclasses
from datetime import UTC, datetime

import pytest
import torch
from interpreted_decode import a_step, run, split
from sampling import sampled

from autotune import Entry, Store, Timing
from swat_flex import swat_decode
from swat_flex.backends import banded, triton
from swat_flex.backends.triton import decode_op
from swat_flex.backends.triton.config import DecodeConfig
from swat_flex.problem import Problem
from swat_flex.tuning.plan import jobs_of
from swat_flex.tuning.tasks import SwatTask

TUNED = DecodeConfig(16, 2, 2, 2)


@pytest.fixture
def launched(monkeypatch):
    """The configurations that steps ran with."""
    seen, launch = [], decode_op._launch

    def watched(config, *args):
        seen.append(config)
        return launch(config, *args)

    monkeypatch.setattr(decode_op, "_launch", watched)
    return seen


def measure(folder, window, tokens, **changes):
    """Keep TUNED as the winner for steps of `a_step`'s other sizes."""
    of = Problem.of_self_attention(12, window + tokens - 1, 16, torch.float16, "cpu", window)
    given = {"kv_heads": 4, "q_len": tokens, "has_logit_bias": True, "needs_grad": False}
    of = dataclasses.replace(of, **given | changes)
    space = decode_op.DECODE.space(of)
    winner, default = space.to_json(TUNED), space.to_json(space.default)
    timings = [(default, Timing(2.0, 0.1, 15)), (winner, Timing(1.0, 0.1, 15))]
    key = decode_op.DECODE.key(of)
    Store(folder).put(Entry(key, winner, default, timings, [], "wall", False, datetime(2026, 1, 1, tzinfo=UTC)))


def test_a_measured_configuration_runs_in_its_bucket_alone(measured, launched):
    """Of windows of 65 keys and more, up to 128 seen keys, whatever else a ring has slots for."""
    measure(measured, window=120, tokens=4)
    for window, queries in ((100, (4, 3)), (125, (16, 4))):
        q, cache, options, *_ = a_step(window=window, queries=queries)
        expected = run(banded, q, cache, options)
        torch.testing.assert_close(run(triton, q, cache, options), expected, atol=2e-2, rtol=1e-2)
    assert launched == [TUNED, TUNED]
    for changes in ({"window": 64}, {"queries": (4, 2)}, {"group": 5}, {"vectors": "slopes"}, {"head_dim": 40}):
        q, cache, options, *_ = a_step(**{"window": 100} | changes)
        run(triton, q, cache, options)
    assert launched[2:] == [DecodeConfig(64, 4, 4)] * 5
    q, cache, options, *_ = a_step(window=100)
    with split(1):
        run(triton, q, cache, options)
    assert launched[-1] == DecodeConfig(32, 4, 1, 1)


def test_a_measured_configuration_is_used_inside_a_users_graph(measured, launched):
    measure(measured, window=40, tokens=3)
    q, cache, options, *_ = a_step(window=40)
    compiled = torch.compile(
        lambda q: swat_decode(q, cache, backend="triton", **options), backend="aot_eager", fullgraph=True
    )
    compiled(q)
    assert launched == [TUNED]


def test_a_configuration_in_force_fails_and_is_not_replaced(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def short(*_):
        raise OutOfResources(200_000, 100_000, "shared memory")

    monkeypatch.setattr(decode_op, "_launch", short)
    q, cache, options, *_ = a_step(window=40)
    with split(1), pytest.raises(OutOfResources):
        run(triton, q, cache, options)


@pytest.mark.parametrize("changes", sampled([{}, {"q_len": 3, "kv_len": 72, "batch": 3, "has_slopes": False}], 2))
def test_tuning_accepts_right_steps_and_refuses_wrong_ones(changes, monkeypatch):
    of = Problem.of_self_attention(4, 70, 16, torch.float32, "cpu", 70)
    given = {"kv_heads": 2, "q_len": 1, "has_logit_bias": True, "needs_grad": False}
    (job,) = jobs_of(dataclasses.replace(of, **given | changes), "auto", 10, decode=True)
    task, launch = SwatTask(job), decode_op._launch
    for config in (DecodeConfig(32, 4, 1), DecodeConfig(16, 4, 1, 4)):
        assert task.check(task.prepare(config)()) is None
    monkeypatch.setattr(decode_op, "_launch", lambda *args: launch(*args) * 1.0001)
    assert "out (float32" in task.check(task.prepare(config)())
    monkeypatch.setattr(
        decode_op, "_launch", lambda config, inputs, window, scale: launch(config, inputs, window - 1, scale)
    )
    assert "out (float32" in task.check(task.prepare(config)())
