"""RingCache: what it keeps, what it costs, and what it refuses."""

import copy
import gc
import io
import pickle
import re

import pytest
import torch

from swat_flex import RingCache, flex_swat, swat_decode


def tokens(batch, heads, length, dim=4):
    """Keys whose every channel is their position, counted in each row from 0."""
    return torch.arange(float(length))[:, None].expand(batch, heads, length, dim).contiguous()


def held(cache, row=0):
    """Positions that a row holds, by slot."""
    return cache.keys[row, 0, :, 0].tolist()


@pytest.mark.parametrize("chunks", [[1] * 11, [3, 8], [11], [2, 0, 9]])
@pytest.mark.parametrize("queries", [1, 3])
def test_position_p_lives_in_slot_p_modulo_slots(chunks, queries):
    cache, k = RingCache(1, 2, 4, 4, 3, queries=queries), tokens(1, 2, 11)
    first = 0
    for n in chunks:
        cache.append(k[:, :, first : first + n], -k[:, :, first : first + n, :3])
        first += n
    slots = 4 + queries - 1
    expected = [max(p for p in range(11) if p % slots == s) for s in range(slots)]
    assert held(cache) == expected
    assert torch.equal(cache.values, -cache.keys[..., :3])
    assert cache.length.tolist() == [11]


def test_skipped_tokens_leave_no_trace_and_take_no_slot():
    """Fewer kept than slots, as many, more; holes; a row that keeps nothing; NaN in what is skipped."""
    mask = torch.zeros(5, 12, dtype=torch.bool)
    mask[0, 9:] = mask[1, ::3] = mask[2, :11] = mask[3, 1:] = True
    real = tokens(5, 1, 12).masked_fill(~mask[:, None, :, None], float("nan"))
    cache, start = RingCache(5, 1, 4, 4), tokens(5, 1, 2) - 100
    cache.append(start, start)
    cache.append(real, real, mask)
    assert cache.length.tolist() == [5, 6, 13, 13, 2]
    for row in range(5):
        alone = RingCache(1, 1, 4, 4)
        alone.append(start[row : row + 1], start[row : row + 1])
        alone.append(real[row : row + 1, :, mask[row]], real[row : row + 1, :, mask[row]])
        assert held(cache, row) == held(alone)


@pytest.mark.parametrize("sizes", [[1] * 30, [30], [7, 1, 22]])
def test_masked_chunks_of_any_size_hold_the_same(sizes):
    mask, k = torch.rand(3, 30) < 0.5, torch.randn(3, 2, 30, 4)
    whole, parts = RingCache(3, 2, 6, 4), RingCache(3, 2, 6, 4)
    whole.append(k, k, mask)
    first = 0
    for n in sizes:
        positions = parts.positions(n, mask[:, first : first + n])
        kept = mask[:, : first + n].cumsum(1)[:, first:] - 1
        assert torch.equal(positions, kept)
        parts.append(k[:, :, first : first + n], k[:, :, first : first + n], mask[:, first : first + n])
        first += n
    assert torch.equal(whole.keys, parts.keys)
    assert torch.equal(whole.length, parts.length)
    assert torch.equal(whole.positions(2), whole.length[:, None] + torch.arange(2))


@pytest.mark.parametrize("rows", [torch.tensor([False, True, True]), torch.tensor([2, 1])])
def test_reset_empties_the_rows_named(rows):
    cache = RingCache(3, 1, 4, 4)
    cache.append(tokens(3, 1, 6), tokens(3, 1, 6))
    cache.reset(rows)
    assert cache.length.tolist() == [6, 0, 0]
    cache.reset()
    assert cache.length.tolist() == [0, 0, 0]


def test_reorder_follows_the_beams():
    cache, k = RingCache(3, 1, 4, 4), torch.randn(3, 1, 6, 4)
    cache.append(k, k, torch.ones(3, 6, dtype=torch.bool).tril(4))
    before, pointer = copy.deepcopy(cache), cache.keys.data_ptr()
    index = torch.tensor([2, 0, 2])
    cache.reorder(index)
    assert torch.equal(cache.keys, before.keys[index])
    assert torch.equal(cache.length, before.length[index])
    assert cache.keys.data_ptr() == pointer


def test_a_million_tokens_take_the_memory_of_a_window():
    cache, fresh = RingCache(1, 1, 64, 8), RingCache(1, 1, 64, 8)
    pointers = [x.data_ptr() for x in cache.buffers()]
    for _ in range(20):
        chunk = torch.randn(1, 1, 50_000, 8)
        cache.append(chunk, chunk)
    assert cache.length.tolist() == [1_000_000]
    assert cache.nbytes == fresh.nbytes == 2 * 64 * 8 * 4 + 8
    assert [x.untyped_storage().nbytes() for x in cache.buffers()] == [2048, 2048, 8]
    assert [x.data_ptr() for x in cache.buffers()] == pointers
    q, last = torch.randn(1, 1, 1, 8), chunk[:, :, -64:]
    torch.testing.assert_close(swat_decode(q, cache), flex_swat(q, last, last, 64))


def test_a_thousand_steps_leave_no_tensor_behind():
    cache = RingCache(2, 2, 16, 8)

    def live():
        gc.collect()
        return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor)

    def steps(n):
        for _ in range(n):
            q, k, v = torch.randn(3, 2, 2, 1, 8).unbind()
            cache.append(k, v)
            swat_decode(q, cache)

    steps(10)
    before = live()
    steps(1000)
    assert live() <= before


def test_it_keeps_no_graph_of_gradients():
    cache, k = RingCache(1, 1, 4, 4), torch.randn(1, 1, 3, 4, requires_grad=True)
    cache.append(k * 2, k * 2)
    cache.reorder(torch.tensor([0]))
    assert not cache.keys.requires_grad
    assert not list(cache.parameters())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_a_copy_goes_on_where_the_cache_was(way):
    cache, k = RingCache(2, 1, 4, 4, queries=2, dtype=torch.float16), torch.randn(2, 1, 7, 4).half()
    cache.append(k, k)
    if way == "deepcopy":
        twin = copy.deepcopy(cache)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(cache))
    else:
        state = cache.state_dict()
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        twin = RingCache(2, 1, 4, 4, queries=2, dtype=torch.float16)
        twin.load_state_dict(state)
    q = torch.randn(2, 1, 2, 4).half()
    expected = swat_decode(q, cache)
    cache.append(k, k)
    assert torch.equal(swat_decode(q, twin), expected)
    assert (twin.window, twin.queries, twin.slots) == (4, 2, 5)


@pytest.mark.parametrize("made_inside", [True, False])
def test_inference_mode_may_come_and_go(made_inside):
    k = torch.randn(1, 1, 3, 4)
    with torch.inference_mode(made_inside):
        cache = RingCache(1, 1, 4, 4)
    with torch.inference_mode():
        cache.append(k, k)
    cache.append(k, k)
    with torch.inference_mode():
        cache.append(k + 0, k + 0)
        inside = swat_decode(k[:, :, :1], cache)
    assert torch.equal(inside, swat_decode(k[:, :, :1], cache))
    cache.reset()


def test_its_text_says_what_it_is():
    assert "batch=2, heads=3, window=4, head_dim=5, value_dim=6" in repr(RingCache(2, 3, 4, 5, 6))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch": -1}, ValueError, "batch: expected at least 0, got -1"),
        ({"heads": 0}, ValueError, "heads: expected at least 1, got 0"),
        ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
        ({"window": (3, 0)}, TypeError, "window: expected an int, got tuple"),
        ({"window": True}, TypeError, "window: expected an int, got bool"),
        ({"head_dim": 257}, ValueError, "head_dim: expected 1 to 256, got 257"),
        ({"value_dim": 0}, ValueError, "value_dim: expected 1 to 256, got 0"),
        ({"queries": 17}, ValueError, "queries: expected 1 to 16, got 17"),
        ({"dtype": torch.int8}, ValueError, "dtype: expected float32, bfloat16, float16 or float64, got torch.int8"),
    ],
)
def test_what_cannot_be_made_is_said(changes, error, words):
    with pytest.raises(error, match=re.escape(words)):
        RingCache(**{"batch": 1, "heads": 1, "window": 4, "head_dim": 4} | changes)


GOOD = torch.zeros(2, 3, 5, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((1, GOOD), TypeError, "k: expected a torch.Tensor, got int"),
        ((GOOD[0], GOOD), ValueError, "k: expected shape [2, 3, T, 4], got [3, 5, 4]"),
        ((GOOD, GOOD[:, :2]), ValueError, "v: expected shape [2, 3, T, 4], got [2, 2, 5, 4]"),
        ((GOOD.half(), GOOD), ValueError, "k: expected the cache's dtype torch.float32, got torch.float16"),
        ((GOOD, GOOD.to("meta")), ValueError, "v: expected the cache's device cpu, got meta"),
        ((GOOD, GOOD[:, :, :4]), ValueError, "v: expected k's 5 tokens, got 4"),
        ((GOOD, GOOD, [True]), TypeError, "mask: expected a torch.Tensor or None, got list"),
        ((GOOD, GOOD, torch.ones(2, 5)), ValueError, "mask: expected bool of shape [2, 5], got torch.float32 of shape"),
        (
            (GOOD, GOOD, torch.ones(2, 4) > 0),
            ValueError,
            "mask: expected bool of shape [2, 5], got torch.bool of shape",
        ),
    ],
)
def test_what_cannot_be_appended_is_said(arguments, error, words):
    cache = RingCache(2, 3, 4, 4)
    with pytest.raises(error, match=re.escape(words)):
        cache.append(*arguments)
    assert cache.length.tolist() == [0, 0]


def test_rows_that_do_not_exist_are_refused():
    cache = RingCache(2, 3, 4, 4)
    with pytest.raises(ValueError, match=re.escape("rows: expected bool [2] or int [N], got torch.bool of shape [3]")):
        cache.reset(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=re.escape("rows: expected a torch.Tensor or None, got int")):
        cache.reset(1)
    with pytest.raises(ValueError, match=re.escape("index: expected int32 or int64 [2], got torch.int64 of shape [3]")):
        cache.reorder(torch.tensor([0, 1, 1]))
    with pytest.raises(TypeError, match=re.escape("index: expected a torch.Tensor, got list")):
        cache.reorder([0, 1])
