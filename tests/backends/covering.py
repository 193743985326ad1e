"""What `banded` and `cpp` are held to alike: calls in which every two options meet, gradients per head, unseen keys."""

import itertools
from dataclasses import replace

import pytest
import torch
from cases import exact_of, rough_of, swat_case
from pairwise import pairwise

from swat_flex.testing.budget import ENOUGH, assert_within_budget
from swat_flex.testing.check import check

POISON = [float("nan"), float("inf"), float("-inf"), 3e38, -1e4]
OPTIONS = {
    "group": [1, 3, 8],
    "head_dim": [1, 8, 40, 64, 80, 128, 256],
    "value_dim": [None, 24],
    "dtype": ["float32", "bfloat16", "float16"],
    "layout": ["contiguous", "transposed", "expanded heads", "sliced"],
    "documents": ["none", "packed", "padded"],
    "queries": ["all", "half"],
    "logit_bias": ["none", "tensor"],
    "batch": [1, 2],
    "kv_heads": [1, 2],
}
PER_HEAD = {
    "length": [2, 64, 65, 129],
    "window": [1, 64, 129, "L+5", (3, 2), (None, 4), None],
    "group": [1, 3, 8],
    "head_dim": [8, 64],
    **{name: OPTIONS[name] for name in ("dtype", "documents", "batch")},
}


def fits_in_memory(row):
    """The dense reference holds several [B, Hq, Lq, Lk] of float64."""
    return row["length"] < 1000 or row["group"] * row["batch"] * row["kv_heads"] <= 16


def covering(lengths, windows, **more):
    """Cases of `flex_swat`: every two values of two factors meet in one of them."""
    rows = pairwise({"length": lengths, "window": windows, **OPTIONS, **more}, fits_in_memory)
    for seed, row in enumerate(rows):
        fewer = row["length"] // 2 if row.pop("queries") == "half" else 0
        yield swat_case(**row, fewer=fewer, seed=seed)


def covering_per_head(**more):
    """Cases with a slope and a bias for each of more heads than the rule needs elements."""
    for row in pairwise({**PER_HEAD, **more}, lambda row: True):
        yield swat_case(**row, kv_heads=ENOUGH // row["group"] + 1, logit_bias="tensor", seed=7)


def sampled(cases, long, every):
    """Parameters: cases of `long` keys and more take seconds, and every run takes one of `every` of them."""
    counter = itertools.count()
    return [
        pytest.param(
            case, marks=pytest.mark.slow if case.length >= long and next(counter) % every else (), id=str(case)
        )
        for case in cases
    ]


def hold(case, backend):
    """Every element against what rounding explains; whole tensors, where they are large enough, against the budget."""
    if case.length < 1000:  # else it takes half a minute
        check(case, backend)
    if min(x.numel() for x in case.tensors()) >= ENOUGH and case.length >= 15:
        hold_to_budget(case, backend, ("out", "dq", "dk", "dv"))


def hold_to_budget(case, backend, names):
    """The budget compares chances: where all but a few rows are hidden there are too few elements for it.

    With one channel the same roundings are in all rows, so that it takes several draws of the case, stacked.
    """
    draws = [replace(case, seed=case.seed + 1000 * n) for n in range(4 if case.head_dim == 1 else 1)]
    found = [(draw.call(backend), exact_of(draw), rough_of(draw)) for draw in draws]
    assert all(case.in_range(exact) for _, exact, _ in found)
    for name in names:
        actual, exact, rough = (torch.stack([results[name] for results in kind]) for kind in zip(*found, strict=True))
        if exact.count_nonzero() >= ENOUGH or not exact.any():
            assert_within_budget(actual, exact=exact, rough=rough, name=name, window=case.window)
