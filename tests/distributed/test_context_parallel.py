"""`context_parallel_swat` on 2, 3 and 4 gloo processes against one."""

import functools

import pytest
from cases import exact_of, rough_of, swat_case
from ranks import run
from shards_of_a_case import Sharded, run_all, whole

from swat_flex.testing.budget import ENOUGH, assert_within_budget

pytestmark = pytest.mark.xdist_group("processes")

EVEN = {2: (24, 24), 3: (24, 24, 24), 4: (24, 24, 24, 24)}
UNEVEN = {2: (37, 5), 3: (7, 40, 18), 4: (30, 3, 1, 26)}
EMPTY = {2: (0, 21), 3: (20, 0, 13), 4: (9, 0, 0, 30)}


def cases(ranks):
    even, uneven, empty = EVEN[ranks], UNEVEN[ranks], EMPTY[ranks]
    make = functools.partial(swat_case, head_dim=16, dtype="float64", logit_bias="tensor")
    windows = [1, 2, 24, 25, 72, 73, None, (5, 3), (0, 4), (24, 24), (30, None), (None, 2), (None, None)]
    found = [Sharded(make(sum(even), window, seed=i), even) for i, window in enumerate(windows)]
    for i, window in enumerate([4, 24, "L+5", (6, 9), (2, 0), None]):
        found.append(Sharded(make(sum(uneven), window, group=2, value_dim=24, batch=2, seed=i), uneven, known=i % 2))
        found.append(Sharded(make(sum(empty), window, kv_heads=1, documents="padded", batch=2, seed=i), empty))
    for i, (lengths, window) in enumerate([(even, 12), (even, 40), (uneven, 9), (uneven, (8, 4)), (even, None)]):
        for documents in ("packed", "padded"):
            found.append(Sharded(make(sum(lengths), window, 3, documents=documents, batch=2, seed=i), lengths))
    for layout in ("transposed", "expanded heads", "sliced"):
        found.append(Sharded(make(sum(uneven), 9, 2, layout=layout), uneven))
    found.append(Sharded(make(sum(uneven), 17, documents="packed", activation="softmax"), uneven))
    found.append(Sharded(make(sum(even), (9, 3), activation="softmax"), even))
    found.append(Sharded(make(sum(even), 13), even, backend="naive"))
    for window in (20, 60, (10, 10)):
        for dtype in ("float32", "bfloat16", "float16"):
            found.append(Sharded(make(sum(even), window, 2, dtype=dtype, documents="packed"), even))
    return found


CASES = {ranks: cases(ranks) for ranks in (2, 3, 4)}


@functools.cache
def results(ranks):
    """Of every case, what each rank returned."""
    return list(zip(*run(run_all, ranks, CASES[ranks]), strict=True))


EVERY = [pytest.param(ranks, i, id=f"{ranks}-{case}") for ranks in CASES for i, case in enumerate(CASES[ranks])]


@pytest.mark.parametrize(("ranks", "index"), EVERY)
def test_shards_make_the_whole(ranks, index):
    sharded, of_ranks = CASES[ranks][index], results(ranks)[index]
    assert not any(isinstance(x, str) for x in of_ranks), of_ranks
    case = sharded.case
    actual, exact = whole([found for found, _ in of_ranks]), exact_of(case)
    assert actual.keys() == exact.keys()
    for name, expected in exact.items():
        if case.dtype == "float64":
            assert (actual[name] - expected).abs().max() <= 1e-12 * max(expected.abs().max(), 1), name
        elif expected.numel() >= ENOUGH:
            assert_within_budget(
                actual[name], exact=expected, rough=rough_of(case)[name], name=name, window=case.window
            )


@pytest.mark.parametrize(("ranks", "index"), EVERY)
def test_exactly_the_windows_edge_travels(ranks, index):
    """min(window − 1, keys to the left) keys and values, as many on the right of a right side, and their ids; back the
    same."""
    sharded, of_ranks = CASES[ranks][index], results(ranks)[index]
    case = sharded.case
    _, k, v = case.tensors()
    row = case.batch * case.kv_heads * (k.shape[3] + v.shape[3]) * k.element_size()
    ids = case.options().get("document_ids")
    id_row = 0 if ids is None else ids[..., 0].numel() * ids.element_size()
    for rank, (_, batches) in enumerate(of_ranks):
        tokens = sharded.expected_halo(rank)
        if not batches:  # neither sees nor is seen
            assert tokens == 0
            continue
        forward, backward = batches
        assert forward[:2] == (tokens * row, tokens * id_row)
        assert backward == (forward[2], 0, tokens * row)
