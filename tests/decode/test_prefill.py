"""Prefilling against the full forward: in chunks, padded, differentiated, compiled."""

import pytest
import torch
from decode_inputs import cache_for, inputs
from torch._dynamo.testing import CompileCounterWithBackend  # private: counts graphs; torch has no public counter

from swat_flex import flex_swat, naive_swat, swat_decode, swat_prefill
from swat_flex.decode import attend
from swat_flex.testing.budget import assert_within_budget, exact_swat, rough_swat


@pytest.mark.parametrize("window", [1, 5, 17, 200])
@pytest.mark.parametrize("sizes", [[60], [1, 59], [20, 20, 20], [3, 1, 40, 16]])
def test_a_prompt_in_chunks_is_the_prompt(window, sizes):
    q, k, v = inputs(63, dtype=torch.float64)
    cache, rows, first = cache_for(k, v, window), [], 0
    for n in sizes:
        new = slice(first, first + n)
        rows.append(swat_prefill(q[:, :, new], k[:, :, new], v[:, :, new], cache, logit_bias=-0.5))
        first += n
    for t in range(60, 63):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        rows.append(swat_decode(q[:, :, t : t + 1], cache, logit_bias=-0.5))
    expected = naive_swat(q, k, v, window, logit_bias=-0.5)
    torch.testing.assert_close(torch.cat(rows, 2), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefilling_is_within_budget(dtype, activation):
    q, k, v = inputs(150, dtype=dtype)
    cache = cache_for(k, v, 40)
    rows = [
        swat_prefill(q[:, :, new], k[:, :, new], v[:, :, new], cache, activation=activation)
        for new in (slice(0, 70), slice(70, 150))
    ]
    exact, rough = (f(q, k, v, 40, activation=activation) for f in (exact_swat, rough_swat))
    assert_within_budget(torch.cat(rows, 2), exact=exact, rough=rough, window=40)


MASKS = {
    "left padding": lambda n: torch.arange(n) >= torch.tensor([[0], [n // 3], [n - 1]]),
    "mixed lengths": lambda n: torch.arange(n) < torch.tensor([[n], [n // 2], [1]]),
    "holes": lambda n: torch.rand(3, n) < 0.6,
    "an empty row": lambda n: torch.tensor([[True], [False], [True]]).expand(3, n),
}


@pytest.mark.parametrize("sizes", [[48], [7, 1, 30, 10], [1] * 48])
@pytest.mark.parametrize("name", MASKS)
def test_padding_anywhere_changes_nothing(name, sizes):
    """Each row is that of its kept tokens alone, then goes on token by token; what is padded is NaN."""
    mask = MASKS[name](48)
    q, k, v = (x.double() for x in inputs(52, batch=3))
    padded = [x.clone() for x in (q, k, v)]
    for x in padded:
        x[:, :, :48].masked_fill_(~mask[:, None, :, None], float("nan"))
    cache, rows, first = cache_for(k, v, 13), [], 0
    for n in sizes:
        new = slice(first, first + n)
        rows.append(swat_prefill(*(x[:, :, new] for x in padded), cache, mask=mask[:, new], slopes="alibi"))
        first += n
    for t in range(48, 52):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        rows.append(swat_decode(q[:, :, t : t + 1], cache, slopes="alibi"))
    out = torch.cat(rows, 2)
    kept = torch.cat((mask, torch.ones(3, 4, dtype=torch.bool)), 1)
    for row in range(3):
        own = [x[row : row + 1, :, kept[row]] for x in (q, k, v)]
        expected = naive_swat(*own, 13, slopes="alibi")
        torch.testing.assert_close(out[row : row + 1, :, kept[row]], expected, atol=1e-12, rtol=1e-12)
        assert torch.equal(out[row, :, ~kept[row]], torch.zeros_like(out[row, :, ~kept[row]]))


def test_gradients_flow_through_a_chunk_and_not_through_the_cache():
    """Also past padding and past empty slots that are NaN."""
    q, k, v = (x.double() for x in inputs(20))
    mask = torch.rand(2, 20) < 0.7
    padded = [x.masked_fill(~mask[:, None, :, None], float("nan")).requires_grad_() for x in (q, k, v)]
    cache = cache_for(k, v, 6)
    cache.append(torch.full_like(k, float("nan")), torch.full_like(v, float("nan")))
    cache.reset()
    gradients = torch.autograd.grad(swat_prefill(*padded, cache, mask=mask).square().sum(), padded)
    for row in range(2):
        own = [x[row : row + 1, :, mask[row]].requires_grad_() for x in (q, k, v)]
        expected = torch.autograd.grad(naive_swat(*own, 6).square().sum(), own)
        for actual, exact in zip(gradients, expected, strict=True):
            torch.testing.assert_close(actual[row : row + 1, :, mask[row]], exact)
            assert torch.equal(actual[row, :, ~mask[row]], torch.zeros_like(actual[row, :, ~mask[row]]))


def test_a_compiled_prompt_in_chunks_is_few_graphs():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(swat_prefill, fullgraph=True, backend=counter)
    q, k, v = inputs(100)
    cache, rows, first = cache_for(k, v, 8), [], 0
    for n in (10, 20, 13, 30, 27):
        new = slice(first, first + n)
        rows.append(compiled(q[:, :, new], k[:, :, new], v[:, :, new], cache))
        first += n
    torch.testing.assert_close(torch.cat(rows, 2), flex_swat(q, k, v, 8))
    assert counter.frame_count <= 3


def test_a_chunk_whose_lengths_differ_is_refused():
    q, k, v = inputs(5)
    cache = cache_for(k, v, 4)
    with pytest.raises(ValueError, match="q: expected k's 5 tokens, got 4"):
        swat_prefill(q[:, :, :4], k, v, cache)
    assert cache.length.tolist() == [0, 0]


@pytest.mark.parametrize("sizes", [[4] * 10, [1, 3, 2] * 6])
def test_few_tokens_are_decoded_in_the_ring(sizes, monkeypatch):
    """Without a copy of the window's keys; a gradient, a mask or a softmax goes the long way to the same numbers."""
    q, k, v = inputs(sum(sizes), dtype=torch.float64)
    caches = [cache_for(k, v, 7, queries=4) for _ in range(2)]
    monkeypatch.setattr(attend, "_joined", lambda *_: pytest.fail("copied the ring"))
    rows, first = [], 0
    for n in sizes:
        rows.append(swat_prefill(*(x[:, :, first : first + n] for x in (q, k, v)), caches[0]))
        first += n
    monkeypatch.undo()
    torch.testing.assert_close(torch.cat(rows, 2), naive_swat(q, k, v, 7), atol=1e-12, rtol=1e-12)
    new = [x[:, :, :4].requires_grad_() for x in (q, k, v)]
    for x in torch.autograd.grad(swat_prefill(*new, caches[1]).sum(), new):
        assert x.abs().sum() > 0


def test_a_step_that_is_refused_leaves_the_cache_as_it_was():
    q, k, v = inputs(2)
    cache = cache_for(k, v, 4, queries=2)
    with pytest.raises(ValueError, match="slopes: expected one of"):
        swat_prefill(q, k, v, cache, slopes="steep")
    assert cache.length.tolist() == [0, 0]
