"""The kernels as an NVIDIA GPU runs them, σ in inline assembly, on CPU tensors: test_numerics.py starts this file.

float16 alone: float32 needs no assembly, and the interpreter has no bfloat16 products.
"""

import dataclasses
import os

import numpy as np
import pytest
import torch
from interpreted import CASES, FOLDED, LONG, check
from ptx import elementwise, in_threads, in_tile
from sampling import sampled
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from swat_flex import flex_swat, tuned
from swat_flex.backends.triton import TritonConfig, launch, sigmoid
from swat_flex.testing.case import SwatCase

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_numerics.py"

KERNELS = ("forward", "query_gradient", "key_gradients")


@pytest.fixture(autouse=True)
def assembled(monkeypatch):
    """How many elements each packing has evaluated."""
    counts = {1: 0, 8: 0}

    class Result:
        def __init__(self, handle):
            self.handle = handle

        def get_result(self, i):
            return self.handle

    def create_inline_asm(self, asm, constraints, values, types, is_pure, pack):
        inputs = [x.data for x in values]
        counts[pack] += inputs[0].size
        return Result(TensorHandle(elementwise(asm, inputs, pack), values[0].dtype))

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)
    monkeypatch.setattr(launch, "kernel_kind", lambda *_: sigmoid.SHARED.value)
    return counts


@pytest.fixture(params=["queries", *(pytest.param(pair, marks=pytest.mark.slow) for pair in (None, "keys"))], ids=str)
def small_tiles(request):
    """Several tiles of every kind in a short sequence."""
    config = TritonConfig(32, 32, 4, 1)
    forward = dataclasses.replace(config, pair=request.param)
    with tuned.using({f"triton.{name}": config for name in KERNELS} | {"triton.forward": forward}):
        yield


def test_a_thread_holds_four_elements_of_each_of_two_rows():
    rows, columns = np.meshgrid(np.arange(32), np.arange(48), indexing="ij")
    for eight in in_threads(rows).T:
        assert len({*eight[[0, 1, 4, 5]]}) == len({*eight[[2, 3, 6, 7]]}) == 1
    both = rows * 48 + columns
    assert (in_tile(in_threads(both), both.shape) == both).all()


HALF_PRECISION = [dataclasses.replace(case, dtype="float16") for case in CASES + LONG]


@pytest.mark.parametrize("case", sampled(HALF_PRECISION, 24))
def test_output_and_gradients_are_within_budget(case):
    check(case)


@dataclasses.dataclass(frozen=True, repr=False)
class Sloped(SwatCase):
    """Every head with one slope, and logits of a size that undoes a slope's."""

    slope: float = 0.0

    def options(self):
        return {"slopes": torch.full((self.q_heads,), self.slope), "scale": 2.0}


@pytest.mark.parametrize("slope", sampled([-4.2, -5.0, -4.1, -1.0, 0.0, 1.0, 4.1, 4.2, 5.0], 9))
def test_slopes_of_any_steepness_are_within_budget(slope, small_tiles, assembled):
    """The steepest take the way that shares nothing, throughout."""
    case = Sloped(170, 140, group=2, head_dim=16, value_dim=16, dtype="float16", slope=slope)
    check(case)
    assert (assembled[8] > 0) == (abs(slope) * 1.4427 * 16 < 96)


@pytest.mark.parametrize("case", sampled([case for case in FOLDED if case.dtype == "float16"], 6))
def test_folded_edges_are_within_budget(case, small_tiles):
    check(case)


@pytest.mark.parametrize("window", sampled([128, 140], 2))
@pytest.mark.parametrize("value", sampled([float("nan"), float("inf"), 3e4], 3))
def test_an_unseen_key_changes_no_bit(value, window, small_tiles, assembled):
    q, k, v = torch.randn(3, 1, 2, 250, 16).half().unbind()
    k, v = k[:, :1].contiguous(), v[:, :1].contiguous()
    clean = flex_swat(q, k, v, window, backend="triton")
    k[:, :, 30] = value
    out = flex_swat(q, k, v, window, backend="triton")
    unseen = torch.ones(250, dtype=torch.bool)
    unseen[30 : 30 + window] = False
    assert torch.equal(out[:, :, unseen], clean[:, :, unseen])
    assert assembled[8] > 0


def test_reciprocals_are_shared_within_a_row_alone():
    """Else a row's last bits would tell of another row's query."""
    y = np.random.default_rng(0).normal(size=(32, 48)).astype(np.float32)
    changed = y.copy()
    changed[11] += 1

    def weights(y):
        return elementwise(sigmoid._FOUR.value, [y, np.full_like(y, 30), np.ones_like(y)], 8)

    before, after = weights(y), weights(changed)
    others = np.arange(32) != 11
    assert (before[others] == after[others]).all()
    assert (before[11] != after[11]).all()


def test_a_visible_nan_stays_visible(small_tiles):
    q, k, v = torch.randn(3, 1, 1, 150, 16).half().unbind()
    k[:, :, 30] = float("nan")
    out = flex_swat(q, k, v, 80, backend="triton")
    assert out[:, :, 30:110].isnan().all()


@pytest.mark.parametrize("slope", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("shift", [0, 15])
def test_the_tail_of_the_shared_sigmoid_is_exact(shift, slope):
    """Relative error below 2⁻⁸ down to logits of −20, whatever shares the reciprocal and whatever the row's part."""
    draw = np.random.default_rng(0)
    logits = draw.uniform(-20, 40, (32, 64))
    logits[::3] = draw.uniform(-20, -15, logits[::3].shape)
    y = (-logits * np.log2(np.e) - shift).astype(np.float32)
    row = (slope * np.arange(-16, 16) * 6).astype(np.float32)[:, None] + np.zeros_like(y)
    asm = (sigmoid._FOUR if shift == 0 else sigmoid._FOUR_15).value
    actual = elementwise(asm, [y - row, (30 - shift) - row, np.exp2(row)], 8)
    exact = 2.0**shift / (1 + np.exp(-logits))
    assert (np.abs(actual - exact) / exact).max() < 2e-5
    single = elementwise((sigmoid._EACH if shift == 0 else sigmoid._EACH_15).value, [y], 1)
    assert (np.abs(single - exact) / exact).max() < 2e-5


@pytest.mark.parametrize("shift", [0, 15])
def test_logits_beyond_the_tail_neither_overflow_nor_disturb_their_row(shift):
    logits = np.full((16, 16), -1e4)
    logits[:, 0] = 1.0
    y = (-logits * np.log2(np.e) - shift).astype(np.float32)
    zero = np.zeros_like(y)
    asm = (sigmoid._FOUR if shift == 0 else sigmoid._FOUR_15).value
    actual = elementwise(asm, [y, zero + (30 - shift), zero + 1], 8) * 2.0**-shift
    assert np.abs(actual[:, 0] - 1 / (1 + np.exp(-1))).max() < 1e-6
    assert actual[:, 1:].max() <= 2.0**-30
