"""The kernels' numerics, run by Triton's interpreter on CPU tensors: see test_numerics.py, which starts this file.

The interpreter has neither bfloat16 products nor inline assembly: float32 and float16, σ by exp2 and division.
"""

import dataclasses
import mmap
import os

import pytest
import torch
from cases import exact_of, rough_of, swat_case
from pairwise import pairwise
from sampling import sampled

from swat_flex import flex_swat, naive_swat, tuned
from swat_flex.backends.triton import TritonConfig, launch, op
from swat_flex.operands import Operands
from swat_flex.testing.budget import ENOUGH, assert_within_budget, exact_swat, rough_swat
from swat_flex.window import Window

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_numerics.py"

FACTORS = {
    "length": [1, 31, 32, 33, 65, 130],
    "window": [1, 2, 31, 33, 64, "L", "L+5", (3, 2), (None, 4), (40, None), None],
    "group": [1, 3],
    "head_dim": [1, 16, 40, 64],
    "value_dim": [None, 24],
    "dtype": ["float32", "float16"],
    "layout": ["contiguous", "transposed", "expanded heads", "sliced"],
    "documents": ["none", "packed", "padded"],
    "queries": ["all", "half"],
    "logit_bias": ["none", "tensor"],
    "batch": [1, 2],
}


def case_of(row, seed):
    queries = row.pop("queries")
    fewer = row["length"] // 2 if queries == "half" else 0
    return swat_case(**row, kv_heads=1, fewer=fewer, seed=seed)


CASES = [case_of(row, seed) for seed, row in enumerate(pairwise(FACTORS, lambda row: True))]
# Long enough for tiles that every row sees whole, in each kernel's own block sizes.
LONG = [
    swat_case(300, 180, 2, 16, dtype="float16", kv_heads=1, logit_bias="tensor"),
    swat_case(300, (100, 70), 1, 16, dtype="float16", kv_heads=1),
    swat_case(260, None, 1, 40, dtype="float16", kv_heads=1, documents="packed"),
    swat_case(200, 150, 2, 16, dtype="float32", kv_heads=1, fewer=30, logit_bias="tensor"),
    swat_case(140, (90, None), 1, 16, 24, "float32", kv_heads=1),
]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """What a kernel does not write is NaN."""

    def poisoned(empty):
        def make(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return make

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_permuted", poisoned(torch.empty_permuted))


def check(case):
    actual, exact, rough = case.call("triton"), exact_of(case), rough_of(case)
    assert case.in_range(exact)
    for name in ("out", "dq", "dk", "dv"):
        if exact[name].count_nonzero() >= ENOUGH:  # of hidden rows nothing is left to chance
            assert_within_budget(actual[name], exact=exact[name], rough=rough[name], name=name, window=case.window)
    for name, expected in exact.items():  # the per-head sums, and tensors too small for a comparison of chances
        terms = exact["out"].numel() if name in ("dslopes", "dlogit_bias") else 1  # that may cancel in the sum
        error = (actual[name].double() - expected).norm() / max(expected.norm(), terms**0.5)
        assert error < (2e-5 if case.dtype == "float32" else 1e-2), name


@pytest.mark.parametrize("case", [*sampled(CASES, 32), *sampled(LONG, 5)])
def test_output_and_gradients_are_within_budget(case):
    check(case)


@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    sampled([(d, dv) for dv in (1, 17, 256) for d in (1, 2, 15, 17, 96, 128, 129, 255, 256)], 7),
)
def test_every_width_of_head_is_padded_right(head_dim, value_dim):
    dtype = "float16" if (head_dim + value_dim) % 2 else "float32"
    check(swat_case(37, 20, 1, head_dim, value_dim, dtype, kv_heads=1, seed=head_dim))


@pytest.mark.parametrize(
    "config", sampled([TritonConfig(64, 32, 4, 2, True, True), TritonConfig(32, 64, 4, 2, True)], 2)
)
@pytest.mark.parametrize(
    "case",
    sampled(
        [
            swat_case(129, (20, 70), 1, 40, dtype="float16", kv_heads=1, fewer=30),
            swat_case(67, 20, 2, 16, 24, kv_heads=1, batch=2, logit_bias="tensor"),
            swat_case(70, 33, 1, 16, layout="expanded heads", documents="padded"),
            swat_case(33, 5, 1, 8, layout="sliced", kv_heads=1),
            swat_case(100, None, 3, 20, 16, "float16", "transposed", documents="packed", kv_heads=1),
        ],
        3,
    ),
)
def test_descriptors_read_what_pointers_read(case, config, monkeypatch):
    """Bounds, ragged widths and strides; the interpreter ignores warp_specialize."""
    described = []
    real = launch.described

    def spy(*args):
        described.append(args[1])
        return real(*args)

    monkeypatch.setattr(launch, "described", spy)
    monkeypatch.setattr(op, "configurations", lambda *_: (dataclasses.replace(config, descriptors=False),) * 2)
    plain = case.call("triton")
    assert not described
    monkeypatch.setattr(op, "configurations", lambda *_: (config,) * 2)
    by_descriptor = case.call("triton")
    assert described
    assert all(torch.equal(plain[name], by_descriptor[name]) for name in plain)
    check(case)


def sparse(shape, strides, dtype=torch.float16):
    """Zeros of any strides, in memory that exists only where it is written."""
    size = (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


@pytest.mark.parametrize(
    "strides",
    [
        (0, 2**31 + 16, 16, 1),  # heads far apart
        (0, 16, 2**26, 1),  # rows: within one tile already
        (0, 40, 1, 2**28),  # columns
    ],
    ids=str,
)
def test_offsets_beyond_two_to_the_31_elements_are_reached(strides):
    shape = (1, 2, 40, 16)
    tensors = [sparse(shape, strides).copy_(torch.randn(shape)) for _ in range(3)]
    grad = sparse(shape, strides).copy_(torch.randn(shape))
    rest = (None, None, None, Window.of(20), 0.25, "sigmoid")
    apart = Operands(*tensors, *rest)
    together = Operands(*(x.contiguous() for x in tensors), *rest)
    for far, near in (
        ((op._forward(apart),), (op._forward(together),)),
        (op._backward(grad, apart, False), op._backward(grad.contiguous(), together, False)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(far[:3], near[:3], strict=True))


@pytest.mark.parametrize("pair", ["queries", "keys", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case",
    [
        swat_case(150, 90, 2, 16, kv_heads=1, dtype="float16", logit_bias="tensor"),  # two heads of a key head
        swat_case(150, 90, 1, 16, 24, kv_heads=1, fewer=30),  # rows, the last program's second half all beyond the end
        pytest.param(swat_case(97, 60, 1, 16, dtype="float16"), marks=pytest.mark.slow),
        pytest.param(
            swat_case(150, (50, 40), 2, 16, dtype="float16", kv_heads=1, documents="padded"), marks=pytest.mark.slow
        ),
        pytest.param(swat_case(150, 90, 2, 16, kv_heads=2, batch=2, logit_bias="tensor"), marks=pytest.mark.slow),
        pytest.param(swat_case(133, None, 1, 16, documents="packed"), marks=pytest.mark.slow),
        pytest.param(swat_case(150, 5, 2, 16, kv_heads=1), marks=pytest.mark.slow),  # no interior
    ],
    ids=str,
)
def test_every_way_of_pairing_computes_the_same(case, pair):
    with tuned.using({"triton.forward": TritonConfig(32, 16, 4, 2, pair=pair)}):
        check(case)


# Windows of whole tiles, whose edges fold into one.
FOLDED = [
    swat_case(200, 96, 2, 16, kv_heads=1, logit_bias="tensor"),
    swat_case(150, 32, 2, 16, 24, "float16", kv_heads=1),  # no interior
    swat_case(200, 96, 2, 16, dtype="float16", kv_heads=2, batch=2, fewer=41),
    swat_case(200, (40, 23), 2, 16, dtype="float16", kv_heads=1),
    swat_case(170, (0, 63), 1, 40, kv_heads=1, layout="transposed"),
    swat_case(200, (95, 0), 3, 16, dtype="float16", kv_heads=1, documents="packed"),  # which do not fold
    swat_case(200, 65, 2, 16, dtype="float16", kv_heads=1),  # nor does this
]


@pytest.mark.parametrize("descriptors", sampled([False, True], 2))
@pytest.mark.parametrize("pair", sampled(["queries", None], 2))
@pytest.mark.parametrize("case", sampled(FOLDED, 4))
def test_the_windows_edges_fold_into_one_tile(case, pair, descriptors):
    with tuned.using({"triton.forward": TritonConfig(32, 32, 4, 2, descriptors, pair=pair)}):
        check(case)


def test_keys_that_nobody_sees_get_gradients_of_zero():
    case = swat_case(100, 8, 2, 16, fewer=80, kv_heads=1)
    results = case.call("triton")
    assert torch.equal(results["dk"][:, :, :70], torch.zeros(1, 1, 70, 16))
    assert torch.equal(results["dv"][:, :, :70], torch.zeros(1, 1, 70, 16))


def test_two_runs_are_equal_to_the_bit():
    case = swat_case(100, 40, 2, 16, kv_heads=1, dtype="float16", logit_bias="tensor")
    first, second = case.call("triton"), case.call("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_unseen_key_changes_no_bit(value, dtype):
    q, k, v = torch.randn(3, 1, 1, 150, 16).to(dtype).unbind()
    clean = flex_swat(q, k, v, 40, backend="triton")
    k[:, :, 70] = value
    out = flex_swat(q, k, v, 40, backend="triton")
    unseen = torch.ones(150, dtype=torch.bool)
    unseen[70:110] = False
    assert torch.equal(out[:, :, unseen], clean[:, :, unseen])


@pytest.mark.parametrize("logit", sampled([-20.0, -16.0, -12.0, 0.0], 2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_tail_of_the_sigmoid_is_exact(logit, dtype):
    q = torch.zeros(1, 1, 20, 16, dtype=dtype)
    v = torch.full_like(q, 2.0**15)
    out = flex_swat(q, q, v, 1, slopes=None, logit_bias=logit, backend="triton").double()
    exact = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)) * 2.0**15
    assert ((out - exact).abs() / exact).max() < 2**-8


@pytest.mark.parametrize("size", [2.0**-10, 1.0, 2.0**10])
def test_float16_gradients_neither_overflow_nor_vanish_inside(size):
    """dw·w(1 − w) leaves float16's range at both ends; dq, dk are what it would round to 0 or infinity."""
    case = swat_case(70, 30, 1, 16, dtype="float16", kv_heads=1)
    q, k, v = case.tensors()
    grad, bias = (case.gradient().float() * size).half(), -9.0
    leaves = [x.detach().requires_grad_() for x in (q / 8, k / 8, v)]
    out = flex_swat(*leaves, 30, slopes=None, logit_bias=bias, backend="triton")
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact_out = naive_swat(*exact_leaves, 30, slopes=None, logit_bias=bias)
    actual = torch.autograd.grad(out, leaves, grad)
    exact = torch.autograd.grad(exact_out, exact_leaves, grad.double())
    for name, a, e in zip("qkv", actual, exact, strict=True):
        floor = 2.0**-24 * e.numel() ** 0.5  # rounding of the result itself where it is subnormal
        assert (a.double() - e).norm() < 2e-3 * e.norm() + floor, name


def test_a_dtype_the_interpreter_gets_wrong_is_refused():
    q = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16"):
        flex_swat(q, q, q, 2, backend="triton")


@pytest.fixture
def launched(monkeypatch):
    """The tiles of each launch of the forward, on a device that has no room for more than 32 rows."""
    from triton.runtime.errors import OutOfResources

    from swat_flex.backends.triton import forward

    tiles = []

    class Scarce:
        def __getitem__(self, grid):
            def run(*args, **options):
                tiles.append((options["BM"], options["BN"]))
                if options["BM"] > 32:
                    raise OutOfResources(200_000, 100_000, "shared memory")
                real[grid](*args, **options)

            return run

    real = forward.forward_kernel
    monkeypatch.setattr(forward, "forward_kernel", Scarce())
    return tiles


def test_a_device_short_of_shared_memory_gets_smaller_tiles(launched):
    case = swat_case(70, 30, 1, 16, dtype="float16", kv_heads=1)
    q, k, v = case.tensors()
    out = flex_swat(q, k, v, 30, backend="triton")
    assert launched == [(64, 64), (32, 32)]
    torch.testing.assert_close(out.double(), naive_swat(q.double(), k.double(), v.double(), 30), atol=2e-2, rtol=0)


def test_a_configuration_in_force_runs_or_fails(launched):
    """Else a tuner would time the default in the name of what the device has no room for."""
    from triton.runtime.errors import OutOfResources

    q, k, v = swat_case(70, 30, 1, 16, dtype="float16", kv_heads=1).tensors()
    with tuned.using({"triton.forward": TritonConfig(64, 16, 4, 1)}), pytest.raises(OutOfResources):
        flex_swat(q, k, v, 30, backend="triton")
    with tuned.using({"triton.forward": TritonConfig(16, 32, 4, 1)}):
        out = flex_swat(q, k, v, 30, backend="triton")
    assert launched == [(64, 16), (16, 32)]
    torch.testing.assert_close(out.double(), naive_swat(q.double(), k.double(), v.double(), 30), atol=2e-2, rtol=0)


def test_other_tiles_compute_the_same():
    case = swat_case(90, (60, 3), 2, 16, dtype="float32", kv_heads=1, logit_bias="tensor")
    config, exact = TritonConfig(16, 64, 4, 1), exact_of(case)
    with tuned.using({f"triton.{name}": config for name in ("forward", "query_gradient", "key_gradients")}):
        actual = case.call("triton")
    for name in exact:
        error = (actual[name].double() - exact[name]).norm() / max(exact[name].norm(), 1.0)
        assert error < 2e-5, name


def test_operators_pass_torchs_own_check():
    case = swat_case(17, 16, 1, 16, documents="padded", logit_bias="tensor", kv_heads=1)
    q, k, v = (x.detach().requires_grad_() for x in case.tensors())
    options = case.options()
    rest = (options["slopes"].requires_grad_(), options["logit_bias"], options["document_ids"], 15, 0, 0.3, "sigmoid")
    torch.library.opcheck(torch.ops.swat_flex.triton, (q, k, v, *rest))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in (case.gradient(), q, k, v, *rest)]
    torch.library.opcheck(torch.ops.swat_flex.triton_backward, (*plain, True))


def test_it_compiles_inside_a_users_graph():
    case = swat_case(40, 16, 2, 16, kv_heads=1)
    q, k, v = case.tensors()

    def call(q, k, v):
        return flex_swat(q, k, v, 16, backend="triton") * 2

    torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v), call(q, k, v))


def test_steep_slopes_lose_nothing_in_float32():
    """|i − j| as a row's part plus a column's cancels: far apart in a tile, near in the window."""
    q, k, v = torch.randn(3, 4, 1, 64, 8).unbind()
    slopes = torch.tensor([-2.3])
    out = flex_swat(q, k, v, 8, slopes=slopes, backend="triton")
    exact, rough = exact_swat(q, k, v, 8, slopes=slopes), rough_swat(q, k, v, 8, slopes=slopes)
    assert_within_budget(out, exact=exact, rough=rough, window=8)
