import itertools

import pytest
import torch

from swat_flex.window import Window

LENGTHS = [(1, 1), (1, 7), (5, 5), (4, 9), (9, 9), (0, 3), (0, 0)]
WINDOWS = [1, 2, 4, 9, 30, None, (0, 0), (3, 2), (None, 1), (2, None), (None, None), (0, 30)]


def dense(window: Window, q_len: int, kv_len: int) -> torch.Tensor:
    """Visibility written out from the definition, pair by pair."""
    left = float("inf") if window.left is None else window.left
    right = float("inf") if window.right is None else window.right
    mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for row, j in itertools.product(range(q_len), range(kv_len)):
        mask[row, j] = -right <= kv_len - q_len + row - j <= left
    return mask


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_sees_pairs_and_keys_agree_with_the_definition(window, q_len, kv_len):
    w = Window.of(window)
    expected = dense(w, q_len, kv_len)
    distance = torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)
    assert torch.equal(w.sees(distance), expected)
    assert w.pairs(q_len, kv_len) == int(expected.sum())
    for first in range(q_len):
        for last in range(first + 1, q_len + 1):
            seen = expected[first:last].any(0).nonzero().flatten().tolist()
            assert w.keys(first, last, q_len, kv_len) == (seen[0], seen[-1] + 1)


def test_an_int_counts_the_querys_own_key():
    assert Window.of(4) == Window(3, 0)
    assert Window.of(None) == Window(None, 0)
    assert Window.of((5, None)) == Window(5, None)


def test_pairs_of_the_design_formula():
    length, w = 4096, 512
    assert Window.of(w).pairs(length, length) == length * w - w * (w - 1) // 2
