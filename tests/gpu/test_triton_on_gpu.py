"""The Triton kernels on a CUDA device: Hopper's and Blackwell's features, far addresses, checkpointing."""

import dataclasses

import pytest
import torch
from cases import exact_of, rough_of, swat_case
from torch.utils.checkpoint import checkpoint
from within import assert_within

from swat_flex import flex_swat
from swat_flex.testing.budget import ENOUGH, exact_swat, rough_swat, with_gradients

pytestmark = pytest.mark.gpu


def with_fields(monkeypatch, **fields):
    """Ask for fields in every configuration; a launch drops what the GPU has not."""
    from swat_flex.backends.triton import op

    default = op.configurations
    monkeypatch.setattr(op, "configurations", lambda *a: tuple(dataclasses.replace(c, **fields) for c in default(*a)))


@pytest.mark.parametrize("fields", [{"descriptors": True}, {"descriptors": True, "warp_specialize": True}], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        swat_case(1000, 200, 2, 64, dtype="bfloat16", logit_bias="tensor"),
        swat_case(777, (100, 70), 1, 128, dtype="float16", layout="transposed", documents="packed"),
        swat_case(513, None, 4, 80, 24, "bfloat16", documents="padded", batch=2, kv_heads=1),
        swat_case(300, 65, 1, 64, dtype="bfloat16", layout="expanded heads", fewer=100),
        swat_case(257, 64, 1, 256, dtype="float16"),
        swat_case(1, 1, 1, 16, dtype="bfloat16"),
    ],
    ids=str,
)
def test_descriptors_and_specialised_warps_are_right(case, fields, monkeypatch):
    exact, rough = exact_of(case), rough_of(case)
    with_fields(monkeypatch, **fields)
    actual, again = case.call("triton", "cuda"), case.call("triton", "cuda")
    assert all(torch.equal(actual[name], again[name]) for name in actual)
    for name in ("out", "dq", "dk", "dv"):
        if exact[name].numel() >= ENOUGH:
            assert_within(actual[name], exact=exact[name], rough=rough[name], name=name, window=case.window)


@pytest.mark.parametrize("pair", [None, "queries", "keys"])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("window", [400, 384])  # the edges of the second fold into one tile
def test_every_way_of_pairing_is_right(window, group, pair, monkeypatch):
    case = swat_case(1000, window, group, 64, dtype="bfloat16", kv_heads=1, logit_bias="tensor")
    exact, rough = exact_of(case), rough_of(case)
    with_fields(monkeypatch, block_m=64, pair=pair)
    actual = case.call("triton", "cuda")
    assert_within(actual["out"], exact=exact["out"], rough=rough["out"], name="out", window=window)


@pytest.mark.parametrize("slope", [-4.0, -1.6, -1.0, 1.0, 1.6, 4.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slopes_of_any_steepness_are_right(dtype, slope):
    """Beyond 1.04 to 2.1, by tile, a head goes the way that shares no reciprocal."""
    q, k, v = torch.randn(3, 1, 2, 700, 64, device="cuda").to(dtype).unbind()
    options = {"slopes": torch.full((2,), slope, device="cuda"), "scale": 1.0}
    out = flex_swat(q, k, v, 300, backend="triton", **options)
    exact, rough = exact_swat(q, k, v, 300, **options), rough_swat(q, k, v, 300, **options)
    assert_within(out, exact=exact, rough=rough, window=300)


@pytest.mark.parametrize("descriptors", [False, True])
def test_elements_beyond_two_to_the_31_are_reached(descriptors, monkeypatch):
    """Heads that lie 2³¹ elements apart, in one tensor of 4 GiB."""
    with_fields(monkeypatch, descriptors=descriptors)
    if torch.cuda.get_device_properties(0).total_memory < 2**34:
        pytest.skip("needs 16 GiB of GPU memory")
    length, dim = 300, 64
    far = [torch.empty(2**31 + length * dim, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    inputs = [x.as_strided((1, 2, length, dim), (0, 2**31, dim, 1)) for x in far]
    near = [torch.randn(1, 2, length, dim, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    for x, y in zip(inputs, near, strict=True):
        x.copy_(y)
    grad = torch.randn_like(near[0])
    both = [with_gradients(flex_swat, tuple(x), 100, grad, backend="triton") for x in (inputs, near)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_of_sixty_five_thousand_tokens_match_their_own_chunk(head_dim):
    """A gradient at the output's rows of one stretch: what it sends to the keys before it, and nowhere else."""
    window, first, last = 1024, 50000, 50100
    q, k, v = (torch.randn(1, 2, 65537, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    grad = torch.zeros_like(q)
    grad[:, :, first:last] = torch.randn_like(grad[:, :, first:last])
    whole = with_gradients(flex_swat, (q, k, v), window, grad, backend="triton")
    keys = slice(first - window + 1, last)
    chunk = tuple(x.float() for x in (q[:, :, first:last], k[:, :, keys], v[:, :, keys]))
    expected = with_gradients(flex_swat, chunk, window, grad[:, :, first:last].float(), backend="banded")
    for name, seen in (("dq", slice(first, last)), ("dk", keys), ("dv", keys)):
        actual = whole[name].float()
        assert (actual[:, :, seen] - expected[name]).norm() / expected[name].norm() < 8e-3, name
        assert not actual[:, :, : seen.start].any(), name
        assert not actual[:, :, seen.stop :].any(), name


def test_checkpointing_recomputes_the_same_gradients():
    inputs = [torch.randn(1, 4, 500, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, 4, 500, 64, dtype=torch.bfloat16, device="cuda")

    def call(q, k, v):
        return flex_swat(q, k, v, 128, backend="triton")

    plain = torch.autograd.grad(call(*inputs), inputs, grad)
    recomputed = torch.autograd.grad(checkpoint(call, *inputs, use_reentrant=False), inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_a_cuda_graph_replays_descriptors_on_new_values(monkeypatch):
    """A descriptor holds an address; a replay reads what lies there then."""
    with_fields(monkeypatch, descriptors=True)
    inputs = [torch.randn(1, 4, 512, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, 4, 512, 64, dtype=torch.bfloat16, device="cuda")

    def step():
        return torch.autograd.grad(flex_swat(*inputs, 128, backend="triton"), inputs, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
