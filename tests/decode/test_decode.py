"""Decoding against the full forward: token by token, mixed lengths, beams, compiled; locality, errors."""

import copy
import dataclasses
import re

import pytest
import torch
from decode_inputs import cache_for, inputs, some_options
from torch._dynamo.testing import CompileCounterWithBackend  # private: counts graphs; torch has no public counter
from torch.utils.flop_counter import FlopCounterMode

from swat_flex import RingCache, flex_swat, naive_swat, swat_decode, swat_prefill
from swat_flex.backends import cpp
from swat_flex.backends.banded import decode as plain
from swat_flex.backends.cpp import library
from swat_flex.backends.cpp.build import BuildError
from swat_flex.decode.attend import choose
from swat_flex.problem import Problem
from swat_flex.testing.budget import assert_within_budget, exact_swat, rough_swat

needs_compiler = pytest.mark.skipif(library.trouble() is not None, reason="no C++ compiler")
BACKENDS = ["banded", pytest.param("cpp", marks=needs_compiler)]


def token_by_token(q, k, v, window, queries=1, step=1, **options):
    cache, rows = cache_for(k, v, window, queries), []
    for first in range(0, q.shape[2], step):
        new = slice(first, first + step)
        cache.append(k[:, :, new], v[:, :, new])
        rows.append(swat_decode(q[:, :, new], cache, **options))
    return torch.cat(rows, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("queries", "step"), [(1, 1), (4, 1), (4, 3), (4, 4)])
@pytest.mark.parametrize(("window", "group"), [(1, 2), (2, 1), (8, 3), (33, 2)])
def test_token_by_token_is_the_full_forward(window, group, queries, step, dtype, backend):
    q, k, v = inputs(3 * window + 2, group, dtype, batch=32, value_dim=40)
    options = some_options(q)
    actual = token_by_token(q, k, v, window, queries, step, backend=backend, **options)
    exact, rough = exact_swat(q, k, v, window, **options), rough_swat(q, k, v, window, **options)
    assert_within_budget(actual, exact=exact, rough=rough, window=window)
    for tokens in {1, window - 1, window, window + 1, 3 * window} - {0}:
        row = slice(tokens - 1, tokens)
        assert_within_budget(
            actual[:, :, row], exact=exact[:, :, row], rough=rough[:, :, row], name=f"token {tokens}", window=window
        )


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "group", "tokens", "window", "head_dim", "value_dim"),
    [
        (1, 1, 4, 1, 5000, 128, 128),
        (3, 2, 1, 1, 700, 80, 24),
        (2, 1, 7, 3, 1100, 40, 256),
        (33, 2, 2, 1, 100, 64, 64),
        (1, 3, 3, 16, 300, 1, 5),
    ],
)
def test_keys_split_over_tasks_add_up(batch, heads, group, tokens, window, head_dim, value_dim, dtype):
    """Rows of other lengths side by side, the ring wrapped in some, and to the bit for any number of threads."""
    q, k, v = inputs(2 * window, group, dtype, batch, heads, head_dim, value_dim)
    lengths = [max(2 * window - 97 * row, tokens) for row in range(batch)]
    cache = cache_for(k, v, window, queries=tokens)
    cache.append(k, v, torch.arange(2 * window) < torch.tensor(lengths)[:, None])
    new, options, before = q[:, :, :tokens], some_options(q), torch.get_num_threads()
    options["slopes"] *= 30 / window
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(swat_decode(new, cache, backend="cpp", **options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results)
    own = [[x[row : row + 1, :, :length] for x in (k, v)] for row, length in enumerate(lengths)]
    exact, rough = (
        torch.cat([f(new[row : row + 1], *kv, window, **options) for row, kv in enumerate(own)])
        for f in (exact_swat, rough_swat)
    )
    assert_within_budget(results[0], exact=exact, rough=rough, window=window)


@pytest.mark.parametrize("slopes", ["balanced", "alibi", None])
@pytest.mark.parametrize("logit_bias", [None, -1.5])
def test_it_is_the_last_rows_of_flex_swat(slopes, logit_bias):
    q, k, v = inputs(50, dtype=torch.float64)
    options = {"slopes": slopes, "logit_bias": logit_bias, "scale": 0.3}
    cache = cache_for(k, v, 20, queries=5)
    cache.append(k, v)
    actual, expected = swat_decode(q[:, :, -5:], cache, **options), flex_swat(q, k, v, 20, **options)[:, :, -5:]
    torch.testing.assert_close(actual, expected, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("queries", [1, 4])
def test_every_slot_computed_and_hidden_gives_the_same(queries):
    """What devices without kernels of their own run."""
    for kept in (0, 1, 5, 9, 10, 40):
        q, k, v = inputs(40, dtype=torch.float64)
        cache = cache_for(k, v, 9, queries)
        cache.append(k, v, torch.arange(40) < torch.tensor([[kept], [kept // 2]]))
        rest = (cache.keys, cache.values, cache.length, torch.randn(4).double(), torch.randn(4).double(), 9, 0.3)
        for values in (cache.keys, cache.values):  # what an empty slot holds
            values[(torch.arange(cache.slots) >= cache.length[:, None])[:, None].expand(-1, 2, -1)] = float("nan")
        new = q[:, :, :queries]
        torch.testing.assert_close(plain.all_slots(new, *rest), plain.decode(new, *rest), atol=1e-13, rtol=1e-13)


def test_finished_rows_stay_where_they_are():
    q, k, v = inputs(20, dtype=torch.float64)
    cache = cache_for(k, v, 6)
    for t in range(20):
        going = torch.tensor([[True], [t < 9]])
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1], going)
        out = swat_decode(q[:, :, t : t + 1], cache)
        expected = naive_swat(q[:, :, : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], 6)
        torch.testing.assert_close(out[0], expected[0, :, -1:])
        if t < 9:
            torch.testing.assert_close(out[1], expected[1, :, -1:])
    assert cache.length.tolist() == [20, 9]
    short = naive_swat(q[1:, :, -1:], k[1:, :, :9], v[1:, :, :9], 6)
    torch.testing.assert_close(out[1:], short)


def test_beams_and_reset_rows_are_sequences_of_their_own():
    q, k, v = (x.double() for x in inputs(30, batch=3))
    cache, story = cache_for(k, v, 8), [[(row, t) for t in range(12)] for row in range(3)]
    cache.append(k[:, :, :12], v[:, :, :12])
    for t in range(12, 30):
        if t == 15:
            cache.reorder(torch.tensor([1, 1, 0]))
            story = [list(story[1]), list(story[1]), list(story[0])]
        if t == 21:
            cache.reset(torch.tensor([False, False, True]))
            story[2] = []
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        out = swat_decode(q[:, :, t : t + 1], cache)
        for row in range(3):
            story[row].append((row, t))
            own = [torch.stack([x[r, :, s] for r, s in story[row]], 1)[None] for x in (k, v)]
            expected = naive_swat(q[row : row + 1, :, t : t + 1], *own, 8)
            torch.testing.assert_close(out[row : row + 1], expected)


def test_more_queries_than_tokens_see_nothing():
    q, k, v = inputs(6, dtype=torch.float64)
    cache = cache_for(k, v, 4, queries=4)
    cache.append(k[:, :, :4], v[:, :, :4], torch.tensor([[False, False, True, True], [False] * 4]))
    out = swat_decode(q[:, :, :4], cache)
    assert torch.equal(out[0, :, :2], torch.zeros(4, 2, 24))
    assert torch.equal(out[1], torch.zeros(4, 4, 24))
    torch.testing.assert_close(out[:1, :, 2:], naive_swat(q[:1, :, 2:4], k[:1, :, 2:4], v[:1, :, 2:4], 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e30])
def test_an_unseen_slot_changes_no_bit(value, backend):
    """Keys and values: of slots not reached, left over from before a reset, and past the window in a wider ring."""
    q, k, v = inputs(30)

    def newest(cache):
        return swat_decode(q[:, :, :1], cache, backend=backend)

    fresh, used = cache_for(k, v, 9, queries=4), cache_for(k, v, 9, queries=4)
    junk = torch.full_like(k, value), torch.full_like(v, value)
    used.append(*junk)
    used.reset()
    for cache in (fresh, used):
        cache.append(k[:, :, :3], v[:, :, :3])
    assert torch.equal(newest(used), newest(fresh))
    assert torch.equal(
        swat_prefill(q[:, :, :2], k[:, :, :2], v[:, :, :2], copy.deepcopy(used)),
        swat_prefill(q[:, :, :2], k[:, :, :2], v[:, :, :2], copy.deepcopy(fresh)),
    )
    used.append(junk[0][:, :, :4], junk[1][:, :, :4])
    fresh.append(k[:, :, :4], v[:, :, :4])
    for cache in (fresh, used):
        cache.append(k[:, :, 4:13], v[:, :, 4:13])
    assert torch.equal(newest(used), newest(fresh))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit", [-20.0, -12.0, 0.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_tail_of_the_sigmoid_is_exact(logit, dtype, backend):
    cache, q = RingCache(1, 1, 1, 8, dtype=dtype), torch.zeros(1, 1, 1, 8, dtype=dtype)
    cache.append(q, torch.full_like(q, 2.0**15))
    out = swat_decode(q, cache, slopes=None, logit_bias=logit, backend=backend).double()
    exact = torch.sigmoid(torch.tensor(logit, dtype=torch.float64)) * 2.0**15
    assert ((out - exact).abs() / exact).max() < 2**-8


@pytest.mark.parametrize("name", ["q", "slopes", "logit_bias"])
def test_decoding_says_that_it_has_no_gradient(name):
    q, k, v = inputs(3)
    cache, options = cache_for(k, v, 4), some_options(q)
    cache.append(k, v)
    given = {"q": q[:, :, :1], **options}
    given[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name}: expected no gradient to be required"):
        swat_decode(cache=cache, **given)
    with torch.no_grad():
        swat_decode(cache=cache, **given)


def step(q, k, v, cache, mask=None):
    cache.append(k, v, mask)
    return swat_decode(q, cache)


@pytest.mark.parametrize("masked", [False, True])
def test_a_thousand_compiled_steps_are_one_graph(masked):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    cache, plain_cache = RingCache(2, 2, 16, 8), RingCache(2, 2, 16, 8)
    pointers, nbytes = [x.data_ptr() for x in cache.buffers()], cache.nbytes
    with torch.inference_mode():
        for _ in range(1000):
            q, k, v = torch.randn(3, 2, 2, 1, 8).unbind()
            mask = torch.rand(2, 1) < 0.8 if masked else None
            out = compiled(q, k, v, cache, mask)
            torch.testing.assert_close(out, step(q, k, v, plain_cache, mask))
    assert counter.frame_count == 1
    assert torch.equal(cache.length, plain_cache.length)
    assert torch.equal(cache.keys, plain_cache.keys)
    assert [x.data_ptr() for x in cache.buffers()] == pointers
    assert cache.nbytes == nbytes


def test_a_compiled_step_writes_the_ring_in_place():
    """Inductor makes no copy of it: the code it generates allocates nothing of a ring's size."""
    from torch._inductor.utils import run_and_get_code  # private: what torch.compile generated

    torch._dynamo.reset()
    cache, new = RingCache(2, 2, 16, 8), torch.randn(3, 2, 2, 1, 8).unbind()
    with torch.inference_mode():
        for mask in (None, torch.tensor([[True], [False]])):
            _, (code, *_) = run_and_get_code(torch.compile(step, fullgraph=True), *new, cache, mask)
            assert re.search("(cpp|banded)_decode", code)
            assert "= empty_strided_cpu((2, 2, 16, 8)" not in code


def test_chunks_of_the_ring_add_up(monkeypatch):
    q, k, v = inputs(700, dtype=torch.bfloat16, batch=4)
    cache = cache_for(k, v, 500, queries=3)
    cache.append(k, v)
    whole = swat_decode(q[:, :, -3:], cache, backend="banded")
    monkeypatch.setattr(plain, "CHUNK", 0)  # the least: 64 slots
    torch.testing.assert_close(swat_decode(q[:, :, -3:], cache, backend="banded"), whole)


def test_under_autocast_everything_takes_the_dtype_of_the_cache():
    q, k, v = inputs(5)
    cache, expected = cache_for(k, v, 4), naive_swat(q, k, v, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = swat_prefill(q, k.double(), v, cache)
        last = swat_decode(q[:, :, -1:], cache)
    assert out.dtype == last.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, expected[:, :, -1:])


def test_output_axes_lie_in_memory_in_qs_order():
    _, k, v = inputs(5)
    cache = cache_for(k, v, 4, queries=3)
    cache.append(k, v)
    q = torch.randn(2, 3, 4, 16).transpose(1, 2)
    out = swat_decode(q, cache)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, swat_decode(q.contiguous(), cache))


def test_nothing_to_do_is_done():
    cache = RingCache(0, 2, 4, 8)
    nothing = torch.zeros(0, 2, 1, 8)
    cache.append(nothing, nothing)
    assert swat_decode(nothing, cache).shape == (0, 2, 1, 8)
    assert swat_prefill(nothing, nothing, nothing, cache).shape == (0, 2, 1, 8)
    assert swat_decode(torch.zeros(1, 2, 0, 8), RingCache(1, 2, 4, 8)).shape == (1, 2, 0, 8)


def test_flops_are_those_of_a_full_window():
    q, k, v = inputs(20)
    cache = cache_for(k, v, 10)
    cache.append(k, v)
    with FlopCounterMode(display=False) as counter:
        swat_decode(q[:, :, :1], cache)
    assert counter.get_total_flops() == 2 * 2 * 4 * 10 * (16 + 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_passes_torchs_own_check(backend):
    operator = getattr(torch.ops.swat_flex, f"{backend}_decode")
    q, k, v = inputs(12)
    cache = cache_for(k, v, 6, queries=2)
    cache.append(k, v)
    rest = (cache.keys, cache.values, cache.length)
    for vectors in ((None, None), (torch.randn(4), torch.randn(4))):
        torch.library.opcheck(operator, (q[:, :, :2], *rest, *vectors, 6, 0.3))


GOOD = torch.zeros(2, 4, 2, 16)


@pytest.mark.parametrize(
    ("q", "options", "error", "words"),
    [
        (3, {}, TypeError, "q: expected a torch.Tensor, got int"),
        (GOOD[0], {}, ValueError, "q: expected shape [2, Hq, T, 16], got [4, 2, 16]"),
        (GOOD[:, :3], {}, ValueError, "q: expected a positive multiple of the cache's 2 heads, got 3"),
        (GOOD.half(), {}, ValueError, "q: expected the cache's dtype torch.float32, got torch.float16"),
        (GOOD.to("meta"), {}, ValueError, "q: expected the cache's device cpu, got meta"),
        (GOOD.repeat(1, 1, 2, 1), {}, ValueError, "q: expected at most the cache's queries = 3 new tokens, got 4"),
        (GOOD, {"slopes": "steep"}, ValueError, "slopes: expected one of 'balanced', 'alibi', got 'steep'"),
        (GOOD, {"slopes": torch.zeros(2)}, ValueError, "slopes: expected shape [Hq] = [4], got [2]"),
        (GOOD, {"scale": "1"}, TypeError, "scale: expected a float or None, got str"),
        (GOOD, {"logit_bias": [1]}, TypeError, "logit_bias: expected a float, a torch.Tensor or None, got list"),
        (GOOD, {"backend": "flex"}, ValueError, "backend: expected one of 'auto', 'triton', 'cpp', 'banded'"),
        (GOOD, {"cache": None}, TypeError, "cache: expected a RingCache, got NoneType"),
    ],
)
def test_what_cannot_be_decoded_is_said(q, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        swat_decode(q, **{"cache": RingCache(2, 2, 4, 16, queries=3)} | options)


def test_a_backend_asked_for_by_name_runs_or_says_why_not():
    q, k, v = inputs(5)
    cache = cache_for(k, v, 4)
    cache.append(k, v)
    expected = swat_decode(q[:, :, -1:], cache)
    torch.testing.assert_close(swat_decode(q[:, :, -1:], cache, backend="banded"), expected)
    with pytest.raises(NotImplementedError, match=r"backend='triton': (the kernels need a GPU|triton is not)"):
        swat_decode(q[:, :, -1:], cache, backend="triton")
    exact = RingCache(2, 2, 4, 16, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"backend='cpp': its kernels compute in float32, got torch.float64"):
        swat_decode(q[:, :, -1:].double(), exact, backend="cpp")
    assert torch.equal(swat_decode(q[:, :, -1:].double(), exact), torch.zeros(2, 4, 1, 16).double())


def a_step(device, dtype=torch.float32):
    return dataclasses.replace(
        Problem.of_self_attention(8, 64, 64, dtype, device, 64), q_len=1, kv_len=64, needs_grad=False
    )


def test_auto_on_cuda_is_triton_where_it_supports_the_step(monkeypatch):
    pytest.importorskip("triton")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose(a_step("cuda", dtype)) == "triton"
    assert choose(a_step("cuda", torch.float64)) == "banded"
    assert choose(a_step("cuda"), "banded") == "banded"
    monkeypatch.setattr("swat_flex.backends.triton.op._INSTALLED", False)
    assert choose(a_step("cuda")) == "banded"


def test_auto_on_a_cpu_is_cpp_where_a_compiler_works(monkeypatch):
    monkeypatch.setattr(cpp, "supports", lambda problem: None)
    assert choose(a_step("cpu")) == "cpp"
    assert choose(a_step("meta")) == "banded"
    monkeypatch.undo()
    monkeypatch.setattr(library, "_load", lambda: BuildError("no C++ compiler: g++ not found"))
    assert choose(a_step("cpu")) == "banded"
    with pytest.raises(NotImplementedError, match=r"backend='cpp': no C\+\+ compiler"):
        choose(a_step("cpu"), "cpp")
