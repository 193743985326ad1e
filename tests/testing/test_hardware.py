"""Twice the budget is enough for a GPU's special functions in float32, and for no fault."""

import pytest
import torch
from cases import exact_of, rough_of, swat_case

from swat_flex import naive_swat, reference, validation
from swat_flex.testing.budget import measure
from swat_flex.testing.check import hold
from swat_flex.testing.hardware import ULPS, allowed_use
from swat_flex.testing.truth import Arithmetic, truth_of

CASES = [swat_case(300, 64), swat_case(700, None), swat_case(1500, None, head_dim=16, kv_heads=1)]


def by_special_functions(x, seen, activation):
    """σ(x) by an exponential and a reciprocal, each off by up to two units in the last place, either way."""
    first, second = 1 + ULPS * torch.finfo(torch.float32).eps * (2 * torch.rand(2, *x.shape, dtype=torch.float64) - 1)
    e = (torch.exp(-x.double()) * first).float()
    return torch.where(seen, (second / (1 + e).double()).float(), 0)


def in_tf32(x):
    """Rounded to the ten bits after the point that a tensor core keeps."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_special_functions_stay_within_what_a_gpu_is_allowed_and_tf32_does_not(case, monkeypatch):
    q, k, v = case.tensors()
    window, options = case.window, case.options()
    exact, rough = exact_of(case)["out"], rough_of(case)["out"]
    tf32 = measure(naive_swat(in_tf32(q), in_tf32(k), v, window, **options), exact, rough)
    monkeypatch.setattr(reference, "weights", by_special_functions)
    hardware = measure(naive_swat(q, k, v, window, **options), exact, rough)
    print(f"special functions use {hardware.use:.2f} of the budget, TF32 {tf32.use:.0f}")
    assert hardware.use <= allowed_use(torch.float32, "cuda") < tf32.use / 50


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_the_fuzzs_rule_agrees(case, monkeypatch):
    """It starts from the same units in the last place."""
    q, k, v = case.tensors()
    window, options = case.window, case.options()
    operands = validation.resolve(q, k, v, window, options["slopes"], None, None, None, "sigmoid", "triton")
    truth = truth_of(operands, None, Arithmetic.of("triton", "cuda", torch.float32))
    with pytest.raises(AssertionError, match="element"):
        hold(truth, {"out": naive_swat(in_tf32(q), in_tf32(k), v, window, **options)})
    monkeypatch.setattr(reference, "weights", by_special_functions)
    hold(truth, {"out": naive_swat(q, k, v, window, **options)})


def test_only_float32_on_a_gpu_may_use_more_than_its_budget():
    assert allowed_use(torch.float32, "cuda:1") == 2
    assert {allowed_use(dtype, "cuda") for dtype in (torch.bfloat16, torch.float16)} == {1}
    assert allowed_use(torch.float32, torch.device("cpu")) == 1
