"""The rule must catch what is wrong, pass what is right, and say which element and why."""

import pytest
import torch
from cases import exact_of, rough_of, swat_case

from swat_flex import naive_swat
from swat_flex.testing.budget import (
    assert_within_budget,
    exact_results,
    measure,
    overflows,
    rough_swat,
    with_gradients,
)

CASE = swat_case(length=200, window=64, group=2, head_dim=32)


FAULTS = {
    "window one short": {"window": 63},
    "window one long": {"window": 65},
    "slopes of the other sign": {"slopes": lambda slopes: -slopes},
    "no slopes": {"slopes": lambda slopes: None},
    "no scale": {"scale": 1.0},
    "a normaliser": {"activation": "softmax"},
    "a scale off by a thousandth": {"scale": 32**-0.5 * 1.001},
    "a logit bias of a thousandth": {"logit_bias": 1e-3},
}


# A thousandth is less than bfloat16 and float16 round away themselves.
PLANTED = [(fault, "float32") for fault in FAULTS] + [
    (fault, dtype) for fault in FAULTS if "thousandth" not in fault for dtype in ("bfloat16", "float16")
]


@pytest.mark.parametrize(("fault", "dtype"), PLANTED)
def test_the_rule_catches_a_planted_fault(fault, dtype):
    case = swat_case(length=200, window=64, group=2, head_dim=32, dtype=dtype)
    options = case.options()
    for name, change in FAULTS[fault].items():
        options[name] = change(options[name]) if callable(change) else change
    window = options.pop("window", case.window)
    actual = naive_swat(*(x.float() for x in case.tensors()), window, **options).to(case.torch_dtype)
    exact, rough = exact_of(case)["out"], rough_of(case)["out"]
    assert not measure(actual, exact, rough).holds
    with pytest.raises(AssertionError, match="worst element"):
        assert_within_budget(actual, exact=exact, rough=rough)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_single_rounding_of_the_exact_result_is_within_budget(dtype):
    case = swat_case(length=200, window=64, group=2, head_dim=32, dtype=dtype)
    exact, rough = exact_of(case), rough_of(case)
    for name, x in exact.items():
        low = torch.float32 if name.startswith(("dslopes", "dlogit")) else rough[name].dtype
        assert measure(x.to(low), x, rough[name], name=name).holds


def test_one_wrong_element_is_found_and_named():
    exact, rough = exact_of(CASE), rough_of(CASE)
    actual = CASE.call("auto")["out"]
    actual[0, 3, 123, 17] += 0.01
    budget = measure(actual, exact["out"], rough["out"], window=64)
    assert not budget.holds
    assert budget.position == (0, 3, 123, 17)
    text = str(budget)
    for part in ("out (float32, window 64)", "max error 0.01", "worst element [0, 3, 123, 17]", "exact", "rough"):
        assert part in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_breaks_the_rule(value):
    exact, rough = exact_of(CASE), rough_of(CASE)
    actual = CASE.call("auto")["out"]
    actual[0, 0, 5, 5] = value
    budget = measure(actual, exact["out"], rough["out"])
    assert not budget.holds
    assert budget.position == (0, 0, 5, 5)


def test_a_systematic_error_below_the_maximum_is_caught_by_the_rms():
    exact = torch.linspace(1, 2, 4096, dtype=torch.float64)
    rough = exact.to(torch.bfloat16)
    shifted = (exact - 2**-7).to(torch.bfloat16)  # one unit in the last place too low, everywhere
    budget = measure(shifted, exact, rough)
    assert budget.max_error <= budget.max_allowed
    assert not budget.holds


def test_rough_is_the_reference_itself_in_float32():
    q, k, v = CASE.tensors()
    options = CASE.options()
    assert torch.equal(rough_swat(q, k, v, 64, **options), naive_swat(q, k, v, 64, **options))


def test_rough_rounds_the_weights_and_the_gradient_of_the_logits():
    """Worked by hand: one token, σ(x) = 0.7310586 rounds to 0.73046875 in bfloat16."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    results = with_gradients(rough_swat, (one, one, one * 256), None, one, slopes=None, scale=1.0)
    weight = torch.tensor(0.7310586).bfloat16().float()
    slope = torch.tensor(0.7310586 * (1 - 0.7310586) * 256).bfloat16().float()
    assert results["out"].item() == (weight * 256).bfloat16().item()
    assert results["dv"].item() == weight.item()
    assert results["dq"].item() == results["dk"].item() == slope.item()


def test_exact_results_are_float64_throughout():
    results = exact_results(CASE.tensors(), 64, CASE.gradient(), **CASE.options())
    assert {x.dtype for x in results.values()} == {torch.float64}


def test_overflow_is_judged_by_the_dtype():
    assert overflows(torch.tensor([1.0, 65520.0], dtype=torch.float64), torch.float16)
    assert not overflows(torch.tensor([65504.0], dtype=torch.float64), torch.float16)
    assert overflows(torch.tensor([float("nan")], dtype=torch.float64), torch.float32)


@pytest.mark.parametrize(
    ("actual", "exact", "message"),
    [
        (torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), "expected float32 or lower"),
        (torch.zeros(3), torch.zeros(3), "expected float32 or lower against float64"),
        (torch.zeros(3), torch.zeros(4, dtype=torch.float64), "expected one shape with elements"),
        (torch.zeros(0), torch.zeros(0, dtype=torch.float64), "expected one shape with elements"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(actual, exact, message):
    with pytest.raises(ValueError, match=message):
        measure(actual, exact, actual)
