"""`banded` against the specification: budget over a pairwise covering, derivatives, locality, every way of cutting."""

import pytest
import torch
from cases import exact_of, swat_case
from covering import POISON, covering, covering_per_head, hold, hold_to_budget, sampled

from swat_flex import flex_swat, naive_swat, tuned
from swat_flex.backends.banded import BandedConfig

LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 1000, 1025]
WINDOWS = [1, 2, 63, 64, 65, 128, 129, "L", "L+5", (3, 2), (None, 4), None]
ACTIVATIONS = ["sigmoid", "softmax"]


@pytest.mark.parametrize("case", sampled(covering(LENGTHS, WINDOWS, activation=ACTIVATIONS), long=1000, every=5))
def test_output_and_gradients_are_within_budget(case):
    hold(case, "banded")


@pytest.mark.parametrize("case", sampled(covering_per_head(activation=ACTIVATIONS), long=129, every=4))
def test_gradients_of_slopes_and_logit_bias_are_within_budget(case):
    """A softmax does not depend on a logit bias: its gradient is rounding and has no budget."""
    names = ("dslopes", "dlogit_bias") if case.activation == "sigmoid" else ("dslopes",)
    hold_to_budget(case, "banded", names)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("window", [1, 3, None, (2, 1), (None, 2), (3, None)], ids=str)
@pytest.mark.parametrize("documents", ["none", "padded"])
def test_all_five_derivatives_in_float64(activation, window, documents):
    more = {"documents": documents, "fewer": 2, "activation": activation, "logit_bias": "tensor"}
    case = swat_case(7, window, 2, 3, 2, "float64", **more)
    options = case.options()
    slopes, bias = options.pop("slopes"), options.pop("logit_bias")
    leaves = [x.detach().requires_grad_() for x in (*case.tensors(), slopes * 5, bias)]

    def call(q, k, v, slopes, bias):
        return flex_swat(q, k, v, window, slopes=slopes, logit_bias=bias, backend="banded", **options)

    assert torch.autograd.gradcheck(call, leaves)


CUTS = [BandedConfig(16, 1, 1), BandedConfig(32, 2**14, 3), BandedConfig(64, 2**16, 2), BandedConfig(200, 2**24, 64)]


@pytest.mark.parametrize("config", CUTS, ids=str)
@pytest.mark.parametrize("window", [1, 70, 600, None, (5, 60), (500, None)], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_any_cut_gives_the_same_result(config, window, dtype):
    """Blocks, chunks of wide windows, groups of heads and batches, converted segments: none may show."""
    case = swat_case(
        700, window, 2, 8, 5, dtype, "transposed", documents="padded", fewer=250, logit_bias="tensor", batch=3
    )
    with tuned.using({"banded.forward": config, "banded.backward": config}):
        actual = case.call("banded")
    exact = exact_of(case)
    for name, expected in exact.items():
        error = (actual[name].double() - expected).norm() / max(expected.norm(), 1e-30)
        assert error < (1e-12 if dtype == "float64" else 1e-2 if name.startswith("d") else 4e-3), name


def test_two_runs_are_equal_to_the_bit():
    case = swat_case(700, 200, 4, batch=2)
    first, second = case.call("auto"), case.call("auto")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("window", [1, 5, 64, 100, (3, 2), (None, 4)], ids=str)
def test_an_unseen_key_changes_no_bit(activation, value, window):
    q, k, v = torch.randn(3, 1, 2, 150, 16).unbind()
    clean = flex_swat(q, k, v, window, activation=activation)
    left, right = window if isinstance(window, tuple) else (window - 1, 0)
    for j in (0, 64, 149):
        poisoned = k.clone()
        poisoned[:, :, j] = value
        out = flex_swat(q, poisoned, v, window, activation=activation)
        i = torch.arange(150)
        unseen = (i - j > (150 if left is None else left)) | (j - i > right)
        assert torch.equal(out[:, :, unseen], clean[:, :, unseen])
        if window != 1 or activation == "sigmoid":  # a softmax over one key is 1 whatever the key
            assert not torch.equal(out[:, :, ~unseen], clean[:, :, ~unseen])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("value", [1e30, -1e30, 0.0])
def test_an_unseen_finite_value_changes_no_bit(activation, value):
    q, k, v = torch.randn(3, 1, 2, 150, 16).unbind()
    clean = flex_swat(q, k, v, 10, activation=activation)
    v[:, :, 70] = value
    out = flex_swat(q, k, v, 10, activation=activation)
    unseen = torch.ones(150, dtype=torch.bool)
    unseen[70:80] = False
    assert torch.equal(out[:, :, unseen], clean[:, :, unseen])


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_other_documents_and_padding_change_no_bit(activation):
    q, k, v = torch.randn(3, 2, 2, 150, 16).unbind()
    ids = torch.zeros(2, 150, dtype=torch.int64)
    ids[:, 50:90], ids[1, 120:] = 1, -1
    clean = flex_swat(q, k, v, 64, document_ids=ids, activation=activation)
    k[:, :, 50:90] = float("nan")
    q[1, :, 120:] = k[1, :, 120:] = float("nan")
    out = flex_swat(q, k, v, 64, document_ids=ids, activation=activation)
    own = (ids == 0)[:, None, :, None].expand_as(out)
    assert torch.equal(out[own], clean[own])
    assert torch.equal(out[1, :, 120:], torch.zeros(2, 30, 16))


def test_visible_nan_is_not_hidden():
    q, k, v = torch.randn(3, 1, 1, 150, 16).unbind()
    k[:, :, 70] = float("nan")
    bad = flex_swat(q, k, v, 10).isnan().any(-1)[0, 0].nonzero().flatten()
    assert bad.tolist() == list(range(70, 80))


def test_saturated_logits_stay_finite():
    q, k, v = (100 * torch.randn(3, 1, 2, 130, 16)).unbind()
    slopes = torch.tensor([-8.0, 8.0])
    leaves = [x.requires_grad_() for x in (q, k, v, slopes)]
    out = flex_swat(q, k, v, 100, slopes=slopes)
    torch.testing.assert_close(out, naive_swat(q, k, v, 100, slopes=slopes), atol=1e-3, rtol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("logit", [-20.0, -16.0, -12.0, -8.0, 0.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tail_of_the_sigmoid_is_exact(logit, dtype):
    """Relative error under 2⁻⁸ down to logits of −20; values large enough that float16 holds the result."""
    q = torch.zeros(1, 1, 70, 8, dtype=dtype)
    v = torch.full_like(q, 2.0**15)
    out = flex_swat(q, q, v, 1, slopes=None, logit_bias=logit).double()
    exact = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)) * 2.0**15
    assert ((out - exact).abs() / exact).max() < 2**-8


def test_wide_windows_in_half_precision_do_not_overflow_inside():
    """σ(x)·v may sum to far more than float16 holds on the way to a result that it does hold."""
    q = torch.zeros(1, 1, 4000, 8, dtype=torch.float16)
    v = torch.full_like(q, 100.0)
    v[:, :, 1::2] = -100.0
    out = flex_swat(q, q, v, None, slopes=None)
    assert out.isfinite().all()
    assert out.abs().max() == 50


def test_operators_pass_torchs_own_check():
    for case in (
        swat_case(70, 16, 2, 8, 5, documents="padded", logit_bias="tensor", fewer=3, batch=2),
        swat_case(33, (3, 2), 1, 8, activation="softmax", dtype="bfloat16", layout="transposed"),
    ):
        q, k, v = (x.detach().requires_grad_() for x in case.tensors())
        options = case.options()
        slopes, bias = options["slopes"].requires_grad_(), options.get("logit_bias")
        left, right = (15, 0) if case.window == 16 else case.window
        activation = case.activation
        rest = (slopes, bias, options.get("document_ids"), left, right, 0.3, activation)
        torch.library.opcheck(torch.ops.swat_flex.banded, (q, k, v, *rest))
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in (case.gradient(), q, k, v, *rest)]
        torch.library.opcheck(torch.ops.swat_flex.banded_backward, (*plain, True))
