"""The truth must be true, what it allows must cover rounding and little more, and the rows' rule must see a trend."""

import dataclasses
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given

from swat_flex.testing.budget import exact_results
from swat_flex.testing.case import SwatCase
from swat_flex.testing.check import check, hold
from swat_flex.testing.strategies import decode_cases, swat_cases
from swat_flex.testing.twofold import Twofold


def fractions(x):
    return [
        Fraction(high) + Fraction(low)
        for high, low in zip(x.high.flatten().tolist(), x.low.flatten().tolist(), strict=True)
    ]


def test_a_matrix_product_of_twice_the_digits():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, *shape, generator=draw, dtype=torch.float64) for shape in ((3, 200), (200, 2)))
    found = fractions(Twofold(a) @ Twofold(b))
    for n, got in enumerate(found):
        row, column = a[0, n // 2].tolist(), b[0, :, n % 2].tolist()
        exact = sum(Fraction(x) * Fraction(y) for x, y in zip(row, column, strict=True))
        assert abs(got - exact) < 2.0**-78


@pytest.mark.parametrize("of", ["exp", "sigmoid", "its complement"])
def test_functions_of_twice_the_digits(of):
    x = torch.cat([torch.linspace(-size, size, 41, dtype=torch.float64) for size in (1e-3, 1.0, 20.0, 600.0)])
    numbers = Twofold(x, x * 1e-17)
    found = numbers.exp() if of == "exp" else numbers.sigmoids()[of != "sigmoid"]
    with localcontext() as context:
        context.prec = 60
        for value, got in zip(fractions(numbers), fractions(found), strict=True):
            exponent = Decimal(value.numerator) / Decimal(value.denominator)
            sign = {"exp": 1, "sigmoid": -1, "its complement": 1}[of]
            power = (sign * exponent).exp()
            exact = power if of == "exp" else 1 / (1 + power)
            assert abs(Decimal(got.numerator) / Decimal(got.denominator) / exact - 1) < Decimal(2) ** -74


# What is given by name or as a number is rounded to float32 for float32, and not for float64.
EXACTLY = {"slopes": ("none", "tensor"), "biases": ("none", "tensor"), "activations": ("sigmoid", "softmax")}


@given(case=swat_cases(dtypes=("float32",), pairs=2**13, **EXACTLY))
def test_the_truth_is_the_definition_and_its_gradients(case):
    truth = case.truth()
    exact = exact_results(case.tensors(), case.window, case.gradient(), **case.options())
    assert truth.exact.keys() == exact.keys()
    for name, x in exact.items():
        assert ((truth.exact[name] - x).abs() <= 1e-7 * truth.allowed[name]).all(), name


@given(case=swat_cases(dtypes=("float64",), activations=("sigmoid", "softmax"), pairs=2**13))
def test_the_truth_of_float64_is_that_of_float64_rounded(case):
    truth = case.truth()
    exact = exact_results(case.tensors(), case.window, case.gradient(), **case.options())
    for name, x in exact.items():
        assert (truth.error(name, x).abs() <= truth.allowed[name]).all(), name
        assert (truth.rest[name].abs() <= truth.exact[name].abs() * 2.0**-52).all(), name


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_what_is_allowed_covers_rounding_and_little_more(dtype, activation):
    """A single rounding of the exact result stays below it; a thousand times the dtype's precision does not."""
    case = SwatCase(40, 12, kv_heads=2, dtype=dtype, activation=activation, slopes="tensor", documents="packed")
    truth = case.truth("banded")
    for name, x in truth.exact.items():
        returned = torch.float32 if name == "dslopes" and dtype != "float64" else case.torch_dtype
        assert (truth.error(name, x.to(returned)).abs() <= truth.allowed[name]).all(), name
        if name in ("out", "dq", "dk", "dv"):  # sums over a head may cancel, what they are allowed does not
            assert truth.allowed[name].max() < 1_000 * torch.finfo(case.torch_dtype).eps * x.abs().max(), name


def test_what_underflows_on_the_way_is_allowed():
    """A gradient of 6.5e-308 where the truth is 0: products of e^x and dw that no float64 holds."""
    case = SwatCase(91, 91, dtype="float64", slopes="tensor", steepness=8.0, bias=-1.1, activation="softmax",
                    grad_exponent=9, seed=2133576279)  # fmt: skip
    assert check(case, "banded").use < 0.5


# Calls like those that the first rule, a comparison with the definition in float32 or float64, held to be wrong.
ONCE_FALSE_ALARMS = {
    "dk": SwatCase(70, 33, kv_heads=2, group=2, head_dim=16, value_dim=16, activation="softmax", qk_exponent=3,
                   scale=-0.6),
    "dq": SwatCase(33, 17, group=8, head_dim=256, value_dim=256, activation="softmax", qk_exponent=1,
                   grad_exponent=-123),
    "dv": SwatCase(40, 31, group=8, head_dim=256, value_dim=256, dtype="float64", logit_bias="number", bias=-12.0,
                   slopes="tensor", steepness=8.0),
}  # fmt: skip


@pytest.mark.parametrize("name", ONCE_FALSE_ALARMS)
@pytest.mark.parametrize("backend", ["banded", "naive"])
def test_what_was_once_a_false_alarm_is_clean(backend, name):
    for seed in range(20):
        case = dataclasses.replace(ONCE_FALSE_ALARMS[name], seed=seed)
        assert check(case, backend).use < 0.7
        if name == "dq":  # near the smallest normal number, 1.2e-38
            assert 1e-39 < case.truth().exact["dq"].abs().median() < 1e-37


def test_a_bias_that_products_are_added_to_is_rounded_with_each():
    """banded's logits of −128 in float64, from 64 products of a thousandth."""
    case = SwatCase(128, 31, fewer=23, head_dim=64, value_dim=64, dtype="float64", slopes="tensor", steepness=8.0,
                    qk_exponent=-2, seed=264)  # fmt: skip
    assert check(case, "banded").use < 0.5


def test_gradients_of_which_none_is_a_normal_number_are_scaled_by_a_power_that_is():
    """The largest is 2⁻¹⁰²⁵: float64 has no 2¹⁰²⁵."""
    case = SwatCase(1, 1, head_dim=1, value_dim=1, dtype="float64", v_exponent=1020, grad_exponent=-1020, seed=12680832)
    assert check(case, "banded").use < 0.5


@pytest.mark.parametrize("factor", [1 + 8 * 2.0**-24, 1 - 8 * 2.0**-24])
def test_rows_that_are_all_too_large_are_seen(factor):
    """By 4 units of the last place of 1, in no element more than what is allowed."""
    case = SwatCase(120, 20, group=2, dtype="float32", slopes="none", logit_bias="number", bias=-6.1, qk_exponent=-2)
    truth, actual = case.truth("banded", gradients=False), case.call("banded", gradients=False)
    assert hold(truth, actual).trend < 0.7
    with pytest.raises(AssertionError, match="rows are too"):
        hold(truth, {"out": (actual["out"].double() * factor).float()})


def test_the_first_wrong_element_is_named():
    case = SwatCase(30, 5)
    truth, actual = case.truth("banded"), case.call("banded")
    actual["dk"] = actual["dk"].clone()
    actual["dk"][0, 0, 7, 3] += 1e-3
    with pytest.raises(AssertionError, match=r"dk: element \[0, 0, 7, 3\]"):
        hold(truth, actual)


def test_a_softmax_that_is_almost_one_weight_keeps_its_gradients_digits():
    """dw − Σ w·dw cancels there: banded loses less than the definition in float32 does."""
    errors = {"banded": [], "naive": []}
    for seed in range(8):
        case = SwatCase(60, None, kv_heads=2, head_dim=16, value_dim=32, activation="softmax", qk_exponent=1, seed=seed)
        truth = case.truth()
        for backend, found in errors.items():
            found.append(truth.error("dq", case.call(backend)["dq"]).abs().flatten())
    banded, naive = (torch.cat(found).median() for found in errors.values())
    assert banded < 0.8 * naive


@given(case=decode_cases(dtypes=("float32", "bfloat16", "float64"), pairs=2**13))
def test_a_decoded_case_is_the_last_rows_of_the_call(case):
    assert check(case, "banded").use <= 1
    whole = dataclasses.replace(case, ring=0)
    assert math.isclose(float(case.truth().exact["out"].sum()), float(whole.truth().exact["out"].sum()))
