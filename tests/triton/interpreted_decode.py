"""The decode kernels' numerics, run by Triton's interpreter on CPU tensors: see test_numerics.py, which starts this
file. Rings and scratch hold NaN wherever nothing was written."""

import copy
import os

import pytest
import torch
from pairwise import pairwise
from sampling import sampled

from swat_flex import RingCache, swat_decode, tuned
from swat_flex.backends import banded, triton
from swat_flex.backends.triton.config import DecodeConfig
from swat_flex.testing.budget import ENOUGH, assert_within_budget, exact_swat, rough_swat

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_numerics.py"

FACTORS = {
    "window": [1, 2, 31, 64, 65, 300],
    "lengths": ["empty", "short", "window", "long", "mixed"],
    "queries": [(1, 1), (4, 1), (4, 3), (16, 16)],
    "group": [1, 3, 5],
    "heads": [1, 2],
    "head_dim": [1, 16, 40, 64],
    "value_dim": [16, 24],
    "dtype": [torch.float32, torch.float16],
    "vectors": ["slopes", "both", "bias", "none"],
    "splits": [None, 1, 3],
}
CASES = pairwise(FACTORS, lambda case: True)


def poisoned(make):
    def call(*args, **kwargs):
        x = make(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    return call


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """What a kernel does not write is NaN: the output and the parts of a split."""
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_permuted", poisoned(torch.empty_permuted))


def split(splits):
    """Force a number of splits; None is the default."""
    return tuned.using({} if splits is None else {"triton.decode": DecodeConfig(32, 4, 1, splits)})


def filled(case):
    """(q, cache, options, all keys and values, lengths) of a case; slots that hold no token are NaN."""
    window, heads, (queries, tokens) = case["window"], case["heads"], case["queries"]
    batch, total = 2, 2 * window + 20
    counts = {"empty": (0, 0), "short": (window // 2 + 1, 1), "window": (window, window), "long": (total, total),
              "mixed": (total - 3, window + 1)}[case["lengths"]]  # fmt: skip
    k = torch.randn(batch, heads, total, case["head_dim"]).to(case["dtype"])
    v = torch.randn(batch, heads, total, case["value_dim"]).to(case["dtype"])
    cache = RingCache(batch, heads, window, k.shape[3], v.shape[3], case["dtype"], queries=queries)
    for ring in (cache.keys, cache.values):
        ring.fill_(float("nan"))
    cache.append(k, v, torch.arange(total) < torch.tensor(counts)[:, None])
    q_heads = heads * case["group"]
    q = torch.randn(batch, tokens, q_heads, case["head_dim"]).to(case["dtype"]).transpose(1, 2)
    slopes = torch.linspace(-0.2, 0.02, q_heads) if case["vectors"] in ("slopes", "both") else None
    bias = torch.randn(q_heads) - 1 if case["vectors"] in ("bias", "both") else None
    return q, cache, {"slopes": slopes, "logit_bias": bias}, (k, v), counts


def run(backend, q, cache, options, scale=0.25):
    vectors = options["slopes"], options["logit_bias"]
    return backend.swat_decode(q, cache.keys, cache.values, cache.length, *vectors, cache.window, scale)


def full(function, q, keys_values, counts, window, options, rows):
    """The last rows of the forward over each sequence, 0 where a sequence has fewer tokens than rows."""
    out = []
    for row, count in enumerate(counts):
        seen = min(count, rows)
        new = q[row : row + 1, :, rows - seen :]
        k, v = (x[row : row + 1, :, :count] for x in keys_values)
        result = function(new, k, v, window, scale=0.25, **options)
        zeros = result.new_zeros(1, q.shape[1], rows - seen, v.shape[3])
        out.append(torch.cat((zeros, result), 2))
    return torch.cat(out)


@pytest.mark.parametrize("case", sampled(CASES, 8))
def test_it_is_the_forward_within_budget(case):
    q, cache, options, keys_values, counts = filled(case)
    with split(case["splits"]):
        actual = run(triton, q, cache, options)
    exact, rough = (
        full(f, q, keys_values, counts, cache.window, options, q.shape[2]) for f in (exact_swat, rough_swat)
    )
    assert actual.isfinite().all()
    if exact.numel() >= ENOUGH and exact.any():
        assert_within_budget(actual, exact=exact, rough=rough, window=cache.window)
    error = (actual.double() - exact).norm() / max(exact.norm(), 1)
    assert error < (2e-6 if case["dtype"] == torch.float32 else 3e-3)


def a_step(window=300, **changes):
    given = {"window": window, "lengths": "mixed", "queries": (4, 3), "group": 3, "heads": 2, "head_dim": 16,
             "value_dim": 16, "dtype": torch.float16, "vectors": "both"}  # fmt: skip
    return filled(given | changes)


@pytest.mark.slow
def test_a_split_of_any_size_is_the_same_sum():
    q, cache, options, *_ = a_step(dtype=torch.float32)
    expected = run(banded, q, cache, options)
    for splits in (1, 2, 7, 17, 40):  # more than there are tiles of keys, more than one tile of parts
        with split(splits):
            actual = run(triton, q, cache, options)
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def test_it_runs_when_asked_for_by_name():
    q, cache, options, *_ = a_step()
    assert torch.equal(swat_decode(q, cache, scale=0.25, backend="triton", **options), run(triton, q, cache, options))
    with pytest.raises(NotImplementedError, match="bfloat16"):
        swat_decode(q.bfloat16(), cache.bfloat16(), backend="triton")


def test_it_compiles_inside_a_users_graph():
    q, cache, options, (k, v), _ = a_step(window=40)

    def step(q, k, v, cache):
        cache.append(k, v)
        return swat_decode(q, cache, backend="triton", **options)

    twin = copy.deepcopy(cache)
    new = k[:, :, :3], v[:, :, :3]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(q, *new, cache)
    torch.testing.assert_close(compiled, step(q, *new, twin))


@pytest.mark.slow
def test_steep_slopes_over_wide_windows_keep_the_digits_of_near_keys():
    """Distances from the tile, not from the oldest key: 0.5·6,000 would leave float32 logits four decimals."""
    q, cache, options, (k, v), counts = a_step(window=6000, dtype=torch.float32, queries=(1, 1))
    options = {"slopes": torch.linspace(-0.5, -0.4, 6), "logit_bias": None}
    exact = full(exact_swat, q, (k, v), counts, cache.window, options, 1)
    error = (run(triton, q, cache, options).double() - exact).norm() / exact.norm()
    assert error < 1e-6


def test_two_runs_are_equal_to_the_bit():
    q, cache, options, *_ = a_step()
    assert torch.equal(run(triton, q, cache, options), run(triton, q, cache, options))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e4])
def test_an_unseen_slot_changes_no_bit(value):
    """Past the window in a ring with room for 16 queries, and what is left over beyond the length."""
    q, cache, options, *_ = a_step(queries=(16, 2))
    clean = run(triton, q, cache, options)
    for row in range(2):
        length = int(cache.length[row])
        seen = [p % cache.slots for p in range(max(0, length - cache.window - 1), length)]
        unseen = torch.ones(cache.slots, dtype=torch.bool)
        unseen[seen] = False
        assert unseen.any()
        cache.keys[row, :, unseen] = value
        cache.values[row, :, unseen] = value
    assert torch.equal(run(triton, q, cache, options), clean)


def test_a_key_that_one_query_sees_and_another_does_not_stays_with_it():
    q, cache, options, *_ = a_step(queries=(2, 2), window=40)
    clean = run(triton, q, cache, options)
    newest = (cache.length - 1) % cache.slots
    cache.keys[torch.arange(2), :, newest] = float("nan")
    out = run(triton, q, cache, options)
    assert torch.equal(out[:, :, 0], clean[:, :, 0])
    assert out[:, :, 1].isnan().all()


@pytest.mark.parametrize("logit", [-20.0, -16.0, -12.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_tail_of_the_sigmoid_is_exact(logit, dtype):
    cache, q = RingCache(1, 1, 1, 16, dtype=dtype), torch.zeros(1, 1, 1, 16, dtype=dtype)
    cache.append(q, torch.full_like(q, 2.0**15))
    out = run(triton, q, cache, {"slopes": None, "logit_bias": torch.tensor([logit])}).double()
    exact = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)) * 2.0**15
    assert ((out - exact).abs() / exact).max() < 2**-8


def test_a_device_short_of_shared_memory_gets_smaller_tiles(monkeypatch):
    from triton.runtime.errors import OutOfResources

    from swat_flex.backends.triton import decode as kernels

    real, launched = kernels.decode_kernel, []

    class Scarce:
        def __getitem__(self, grid):
            def launch(*args, **options):
                launched.append(options["BN"])
                if options["BN"] > 16:
                    raise OutOfResources(200_000, 100_000, "shared memory")
                real[grid](*args, **options)

            return launch

    monkeypatch.setattr(kernels, "decode_kernel", Scarce())
    q, cache, options, *_ = a_step()
    out = run(triton, q, cache, options)
    assert launched == [64, 16]
    torch.testing.assert_close(out.float(), run(banded, q, cache, options).float(), atol=2e-2, rtol=1e-2)


def test_the_operator_passes_torchs_own_check():
    q, cache, options, *_ = a_step(lengths="long")
    vectors = options["slopes"], options["logit_bias"]
    rest = (cache.keys, cache.values, cache.length)
    torch.library.opcheck(torch.ops.swat_flex.triton_decode, (q, *rest, *vectors, cache.window, 0.3))
