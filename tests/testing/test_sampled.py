"""The check of long problems on sampled rows: it accepts what is right and refuses what is wrong anywhere it looks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from swat_flex.problem import Problem
from swat_flex.testing.sampled import PAIRS, SampledReference, samples
from swat_flex.tuning.inputs import Inputs
from swat_flex.tuning.tasks import _call


def problem(window=100, dtype=torch.float32, **changes):
    made = Problem.of_self_attention(4, 700, 16, dtype, "cpu", window)
    return dataclasses.replace(made, **changes)


PROBLEMS = [
    problem(),
    problem((90, 40)),
    problem(None),
    problem((None, None)),
    problem(700, dtype=torch.bfloat16),
    problem(1, kv_heads=1),
    problem(64, batch=2, kv_heads=2, value_dim=24, has_logit_bias=True),
    problem(120, has_documents=True, has_slopes=False, dtype=torch.float16),
    problem(50, activation="softmax"),
    problem(300, q_len=1, batch=3),
    problem((200, 70), q_len=333, kv_heads=1),
]


def answers(inputs, grad):
    return _call("banded", inputs, grad)


@pytest.mark.parametrize("of", PROBLEMS, ids=range(len(PROBLEMS)))
def test_right_results_pass(of):
    inputs = Inputs(of)
    truth = SampledReference(inputs.operands, inputs.grad)
    assert truth.complaint(answers(inputs, inputs.grad), answers(inputs, truth.sampled_gradient())) is None


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
@pytest.mark.parametrize("of", [PROBLEMS[0], PROBLEMS[1], PROBLEMS[6]], ids=(0, 1, 6))
def test_a_small_error_is_refused(of, name):
    inputs = Inputs(of)
    truth = SampledReference(inputs.operands, inputs.grad)
    results, sampled = answers(inputs, inputs.grad), answers(inputs, truth.sampled_gradient())
    results[name] = results[name] * 1.0001
    sampled[name] = sampled[name] * 1.0001
    complaint = truth.complaint(results, sampled)
    assert complaint is not None
    assert complaint.startswith(f"{name} (float32")


def test_nan_anywhere_is_refused():
    inputs = Inputs(PROBLEMS[0])
    results = answers(inputs, inputs.grad)
    results["out"][0, 1, 200, 3] = float("nan")  # in no sample
    assert "finite" in SampledReference(inputs.operands, inputs.grad).complaint(results, results)


def test_a_gradient_where_none_belongs_is_refused():
    inputs = Inputs(dataclasses.replace(PROBLEMS[0], kv_len=3000, q_len=3000))
    truth = SampledReference(inputs.operands, inputs.grad)
    results, sampled = answers(inputs, inputs.grad), answers(inputs, truth.sampled_gradient())
    sampled["dk"][0, 0, 1000, 0] += 1e-6
    assert "expected 0" in truth.complaint(results, sampled)


@pytest.mark.parametrize("window", [(0, 0), (1023, 0), (None, 0), (None, None), (4095, 100)], ids=str)
def test_samples_of_long_problems_are_small(window):
    of = problem(window, kv_len=2**17, q_len=2**17, batch=2)
    found = samples(of)
    assert found[0].rows.stop == of.q_len
    for sample in found:
        rows, keys = sample.rows, sample.keys
        assert (keys.start, keys.stop) == of.window.keys(rows.start, rows.stop, of.q_len, of.kv_len)
        assert (max(rows.stop, keys.stop) - rows.start) * (keys.stop - keys.start) <= PAIRS
