"""The backends on a CUDA device: budget, options, bit equality, locality, graphs, and lengths beyond 2¹⁶."""

import dataclasses

import pytest
import torch
from cases import exact_of, rough_of, swat_case
from within import assert_within

from swat_flex import flex_swat
from swat_flex.testing.budget import ENOUGH

pytestmark = pytest.mark.gpu

CASES = [
    swat_case(1, 1, 1, 64),
    swat_case(129, 64, 3, 64, logit_bias="tensor"),
    swat_case(1000, 200, 2, 128, documents="packed"),
    swat_case(1025, None, 1, 64, layout="transposed", kv_heads=1),
    swat_case(640, (100, 70), 1, 64, documents="padded", batch=2),
    swat_case(513, (None, 4), 4, 40, 24, layout="sliced", kv_heads=1),
    swat_case(700, 128, 8, 80, fewer=300, kv_heads=1, logit_bias="tensor"),
    swat_case(300, 65, 1, 256, layout="expanded heads"),
    swat_case(260, "L+5", 1, 8),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("backend", ["flex", "triton", "banded"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_within_budget(case, backend, dtype):
    if backend == "flex" and dtype == "float16":
        pytest.skip("flex does not train in float16")
    case = dataclasses.replace(case, dtype=dtype)
    actual, exact, rough = case.call(backend, "cuda"), exact_of(case), rough_of(case)
    for name in ("out", "dq", "dk", "dv"):
        if exact[name].numel() >= ENOUGH:
            assert_within(actual[name], exact=exact[name], rough=rough[name], name=name, window=case.window)
    for name in exact.keys() & {"dslopes", "dlogit_bias"}:
        terms = exact["out"].numel() ** 0.5
        assert (actual[name].double() - exact[name]).norm() / max(exact[name].norm(), terms) < 1e-2, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_triton_repeats_to_the_bit(dtype):
    case = swat_case(1500, 400, 4, 64, dtype=dtype, logit_bias="tensor")
    first, second = case.call("triton", "cuda"), case.call("triton", "cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e4, 0.0])
def test_what_a_row_does_not_see_changes_none_of_its_bits(value, head_dim):
    """Other queries too: the four sigmoids of one reciprocal must lie in one row of the tile."""
    q, k, v = (x.cuda() for x in torch.randn(3, 1, 2, 1024, head_dim, dtype=torch.bfloat16).unbind())
    clean = flex_swat(q, k, v, 300, backend="triton")
    q[:, :, 500] = k[:, :, 500] = value
    out = flex_swat(q, k, v, 300, backend="triton")
    unseen = torch.ones(1024, dtype=torch.bool)
    unseen[500:800] = False
    assert torch.equal(out.cpu()[:, :, unseen], clean.cpu()[:, :, unseen])


@pytest.mark.parametrize("logit", [-20.0, -16.0, -12.0, -8.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_tail_of_the_sigmoid_is_exact(logit, dtype):
    q = torch.zeros(1, 1, 512, 64, dtype=dtype, device="cuda")
    v = torch.full_like(q, 2.0**8)
    out = flex_swat(q, q, v, None, slopes=None, logit_bias=logit, backend="triton").double().cpu()[0, 0, :, 0]
    exact = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)) * 2.0**8 * torch.arange(1, 513)
    room = 2**-8 * exact + torch.finfo(dtype).smallest_normal
    assert ((out - exact).abs() <= room).all()


# tanh(x/2) to 2⁻¹¹, as PTX documents it, moves σ(x) by up to 2⁻¹² absolute.
@pytest.mark.parametrize(("logit", "error"), [(0.0, 2**-10), (-5.0, 0.04), (-7.0, 0.27), (-9.0, 2.0)])
def test_the_hardware_tanh_is_as_coarse_as_documented(logit, error):
    q = torch.zeros(1, 1, 256, 64, dtype=torch.bfloat16, device="cuda")
    v = torch.ones_like(q)
    out = flex_swat(q, q, v, 1, slopes=None, logit_bias=logit, activation="tanh-sigmoid", backend="triton").double()
    exact = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)).item()
    assert (out - exact).abs().max() / exact < error + 2**-8


def test_a_cuda_graph_replays_forward_and_backward():
    q, k, v = (torch.randn(1, 4, 512, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3))
    grad = torch.randn(1, 4, 512, 64, dtype=torch.bfloat16, device="cuda")

    def step():
        return torch.autograd.grad(flex_swat(q, k, v, 128, backend="triton"), (q, k, v), grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [x.clone() for x in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_sixty_five_thousand_tokens_match_their_own_chunks():
    """Rows in the middle against a short call of their own: no L × L reference is affordable here."""
    q, k, v = torch.randn(3, 1, 2, 65537, 64, dtype=torch.bfloat16, device="cuda").unbind()
    whole = flex_swat(q, k, v, 1024, backend="triton")
    rows = slice(40000, 40100)
    keys = slice(40000 - 1023, 40100)
    chunk = flex_swat(q[:, :, rows].float(), k[:, :, keys].float(), v[:, :, keys].float(), 1024, backend="banded")
    assert (whole[:, :, rows].float() - chunk).norm() / chunk.norm() < 4e-3
    assert whole.isfinite().all()
