"""The tiles `flex` visits against the definition, pair by pair; nothing is compiled here."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from swat_flex.backends.flex.blocks import BLOCK, BlockLists, Form, Grid, band
from swat_flex.window import Window

CPU = torch.device("cpu")
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1025)
WINDOWS = (1, 2, 64, 127, 128, 129, 130, 256, 300, 5000, (3, 2), (0, 0), (None, 4), (130, None), (0, 200), None)


def visible_pairs(window: Window, q_len: int, kv_len: int, ids: Tensor | None) -> Tensor:
    """Bool `[B, Lq, Lk]`, by the definition."""
    i, j = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
    visible = window.sees(i - j)[None]
    if ids is not None:
        own = ids[:, kv_len - q_len :, None]
        visible = visible & (own == ids[:, None, :]) & (own >= 0)
    return visible


def listed(number: Tensor, indices: Tensor, tiles: int) -> Tensor:
    """Bool `[B, lists, tiles]` of lists in FlexAttention's form; no tile may be named twice."""
    named = torch.zeros(*number.shape[::2], tiles, dtype=torch.int32)
    place = torch.arange(indices.shape[3]) < number[:, 0, :, None]
    named.scatter_add_(2, indices[:, 0].long(), place.int())
    assert named.max() <= 1
    return named.bool()


def check(
    window: Window, q_len: int, kv_len: int, rows: int, columns: int, ids: Tensor | None = None, block: int = BLOCK
) -> BlockLists:
    """Each visible pair lies in a listed tile, each pair of a full tile is visible, both directions agree."""
    _, blocks = band(Grid(window, q_len, kv_len, rows, columns, CPU, block), Form(backward=True), ids)
    partial = listed(blocks.kv_num, blocks.kv_indices, columns)
    full = listed(blocks.full_kv_num, blocks.full_kv_indices, columns)
    assert torch.equal(partial, listed(blocks.q_num, blocks.q_indices, rows).mT)
    assert torch.equal(full, listed(blocks.full_q_num, blocks.full_q_indices, rows).mT)
    assert not (partial & full).any()
    pairs = torch.zeros(len(partial), rows * block, columns * block, dtype=torch.bool)
    pairs[:, :q_len, :kv_len] = visible_pairs(window, q_len, kv_len, ids)
    per_tile = pairs.unflatten(2, (columns, block)).unflatten(1, (rows, block)).sum((2, 4))
    assert (per_tile[full] == block * block).all()
    if ids is None:  # exact: nothing is visited in vain, nothing is masked in vain
        assert torch.equal(partial | full, per_tile > 0)
        assert torch.equal(full, per_tile == block * block)
    else:
        assert (partial | full)[per_tile > 0].all()
    return blocks


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_tiles_are_those_of_the_window(window):
    for length in LENGTHS:
        tiles = -(-length // BLOCK)
        check(Window.of(window), length, length, tiles, tiles)
        check(Window.of(window), length, length, tiles + 2, tiles + 1)  # padded to more


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_tiles_of_half_the_size(window):
    for length in (1, 63, 64, 65, 300):
        tiles = -(-length // 64)
        check(Window.of(window), length, length, tiles, tiles, block=64)
        check(Window.of(window), max(1, length // 2), length, tiles, tiles + 1, block=64)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_merged_lists_name_the_same_tiles_and_neighbours_alone(window):
    """What FlexAttention's BLOCKS_ARE_CONTIGUOUS takes for granted, in both directions."""
    for q_len, kv_len in itertools.product((129, 300, 1025), (1025, 1300)):
        rows, columns = -(-q_len // BLOCK), -(-kv_len // BLOCK)
        grid = Grid(Window.of(window), q_len, kv_len, rows, columns, CPU)
        (_, apart), (_, merged) = (band(grid, Form(backward=True, merged=merged)) for merged in (False, True))
        assert merged.full_kv_num is None is merged.full_q_num
        for which, of in (("kv", columns), ("q", rows)):
            lists = [listed(*(getattr(b, f"{name}{which}_{x}") for x in ("num", "indices")), of)
                     for b, name in ((apart, ""), (apart, "full_"), (merged, ""))]  # fmt: skip
            assert torch.equal(lists[0] | lists[1], lists[2])
            number, indices = getattr(merged, f"{which}_num")[0, 0], getattr(merged, f"{which}_indices")[0, 0]
            for n, named in zip(number.tolist(), indices, strict=True):
                assert named[:n].tolist() == list(range(int(named[0]), int(named[0]) + n))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_tiles_with_fewer_queries_than_keys(window):
    for q_len, kv_len in itertools.product((1, 64, 129, 300), (300, 513, 1025)):
        check(Window.of(window), q_len, kv_len, -(-q_len // BLOCK), -(-kv_len // BLOCK))


@pytest.mark.parametrize("window", [1, 100, 300, (50, 200), None], ids=str)
def test_tiles_with_documents(window):
    for seed, length in enumerate((65, 128, 500, 1025)):
        generator = torch.Generator().manual_seed(seed)
        packed = (torch.rand(length, generator=generator) < 0.01).cumsum(0)
        padded = torch.where(torch.arange(length) < length // 3, -1, 7)
        anyhow = torch.randint(-1, 3, (length,), generator=generator)
        ids = torch.stack((packed, padded, anyhow, torch.full((length,), -1)))
        tiles = -(-length // BLOCK)
        check(Window.of(window), length, length, tiles, tiles, ids)
        check(Window.of(window), length // 2, length, tiles, tiles, ids)


def test_tiles_of_documents_that_do_not_meet_are_skipped():
    ids = (torch.arange(8 * BLOCK) // (2 * BLOCK))[None]
    blocks = check(Window.of(None), 8 * BLOCK, 8 * BLOCK, 8, 8, ids)
    assert (blocks.kv_num + blocks.full_kv_num).flatten().tolist() == [1, 2] * 4


def test_a_tile_of_one_document_needs_no_mask():
    ids = torch.full((1, 8 * BLOCK), 3, dtype=torch.int32)
    blocks = check(Window.of(4 * BLOCK), 8 * BLOCK, 8 * BLOCK, 8, 8, ids)
    assert blocks.full_kv_num.sum() == 3 * 5 + 1 + 2


def test_the_extra_key_is_visited_by_every_row_that_holds_a_query():
    _, blocks = band(Grid(Window.of(100), 300, 300, 4, 5, CPU), Form(extra_key=True, dense_shape=True))
    partial = listed(blocks.kv_num, blocks.kv_indices, 5)
    assert partial[0, :, 4].tolist() == [True, True, True, False]


def test_a_million_tokens_take_little_memory():
    length = 2**20
    tiles = length // BLOCK
    for extra_key in (False, True):
        form = Form(backward=not extra_key, extra_key=extra_key, dense_shape=extra_key)
        _, blocks = band(Grid(Window.of(4096), length, length, tiles, tiles + extra_key, CPU), form)
        assert sum(x.untyped_storage().nbytes() for x in blocks if x is not None) < 64e6
        assert (blocks.kv_num + blocks.full_kv_num).max() == 33 + extra_key
        if extra_key:
            assert blocks.kv_indices.shape == (1, 1, tiles, tiles + 1)
