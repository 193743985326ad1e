"""How `context_parallel_swat` may be called, what it refuses, and what happens when a rank dies."""

import itertools

import calls
import pytest
import torch
from ranks import run

pytestmark = pytest.mark.xdist_group("processes")

RANKS = 3


def everything(rank):
    """Every function of `calls` that leaves the group whole."""
    functions = (
        calls.twice, calls.ways, calls.partial_gradients, calls.order, calls.layout, calls.autocast, calls.shards,
        calls.mistakes, calls.wrong_meshes,
    )  # fmt: skip
    return {function.__name__: function(rank) for function in functions}


@pytest.fixture(scope="module")
def of_ranks():
    found = run(everything, RANKS)
    assert not any(isinstance(x, str) for x in found), found
    return found


def test_runs_repeat_to_the_bit(of_ranks):
    for found in of_ranks:
        first, *others = found["twice"]
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_every_way_to_call_it_gives_the_same(of_ranks):
    expected = [x.tensor_split(RANKS, 2) for x in calls.one_process()]
    for rank, found in enumerate(of_ranks):
        assert len(found["ways"]) == 6
        for results in found["ways"].values():
            for x, y in zip(results, expected, strict=False):
                torch.testing.assert_close(x, y[rank], rtol=0, atol=1e-12)


def test_gradients_where_not_all_inputs_want_one(of_ranks):
    expected = dict(zip("qkv", (x.tensor_split(RANKS, 2) for x in calls.one_process()[1:]), strict=True))
    for rank, found in enumerate(of_ranks):
        for wanted, gradients in found["partial_gradients"].items():
            for name, x in zip(wanted, gradients, strict=True):
                torch.testing.assert_close(x, expected[name][rank], rtol=0, atol=1e-12)


def test_rows_without_halo_are_computed_while_it_travels(of_ranks):
    there_and_back = ["post", "rows", "wait", "rows"], ["rows", "post", "rows", "wait"]
    assert [found["order"] for found in of_ranks[1:]] == [there_and_back] * (RANKS - 1)
    assert of_ranks[0]["order"] == (["post", "rows", "wait"], ["rows", "post", "wait"])


def test_the_output_lies_in_memory_as_the_queries(of_ranks):
    for found in of_ranks:
        actual, expected = found["layout"]
        assert actual == expected


def test_autocast_halves_the_traffic(of_ranks):
    row = calls.CASE.kv_heads * 2 * calls.CASE.head_dim * 2
    assert [found["autocast"] for found in of_ranks] == [(torch.bfloat16, n * row) for n in (0, 8, 8)]


def test_local_shard_and_shard_lengths(of_ranks):
    parts, lengths = zip(*(found["shards"] for found in of_ranks), strict=True)
    assert list(itertools.chain(*parts)) == list(range(11))
    assert set(lengths) == {(4, 4, 3)}


MISTAKES = {
    "batch": "q: expected one batch size on every rank of the mesh, got [1, 1, 2]",
    "key heads": "k: expected one number of heads on every rank of the mesh, got [2, 2, 1]",
    "head dimension": "q: expected one head dimension on every rank of the mesh, got [16, 16, 15]",
    "value dimension": "v: expected one head dimension on every rank of the mesh, got [16, 16, 15]",
    "dtype": "q: expected one dtype on every rank of the mesh, got [torch.float64, torch.float64, torch.float32]",
    "window": "window: expected one right side on every rank of the mesh, got [0, 0, None]",
    "ids": "document_ids: expected one number of dimensions (0 is None) on every rank of the mesh, got [0, 0, 1]",
    "ids' dtype": "document_ids: expected one dtype on every rank of the mesh, got "
    "[torch.int64, torch.int64, torch.int32]",
    "requires_grad": "k, v: expected one requires_grad on every rank of the mesh, got [True, True, False]",
}
REFUSED = {
    "refused": "ValueError: k: expected q's dtype",
    "kind": "TypeError: q: expected a torch.Tensor, got NoneType",
    "backend": "NotImplementedError: backend='flex'",
    "fewer queries": "ValueError: q: expected k's 20 tokens on every rank, got 5",
}


@pytest.mark.parametrize("name", [*MISTAKES, *REFUSED])
def test_a_mistake_on_one_rank_is_an_error_on_all(of_ranks, name):
    *others, last = (found["mistakes"][name] for found in of_ranks)
    if name in REFUSED:
        assert last.startswith(REFUSED[name])
        message = "ValueError: mesh: expected every rank to pass valid arguments; see the error on rank 2 of it"
    else:
        assert (message := f"ValueError: {MISTAKES[name]}") == last.splitlines()[0]
    assert [text.splitlines()[0] for text in others] == [message] * 2


def test_wrong_meshes_and_lengths(of_ranks):
    for rank, found in enumerate(of_ranks):
        several, kind, few, other = (text.splitlines()[0] for text in found["wrong_meshes"])
        assert several.startswith("ValueError: mesh: expected one dimension, such as mesh['context'], got 2 of")
        assert kind == "TypeError: mesh: expected a DeviceMesh or a ProcessGroup, got str"
        assert few == "ValueError: lengths: expected one per rank, 3 of them, got 2"
        assert other == f"ValueError: lengths: expected q's 20 tokens on rank {rank}, got 21"


@pytest.mark.parametrize("when", ["call", "exchange", "backward"])
def test_a_dead_rank_is_an_error_on_the_others_not_a_hang(when):
    timeout = 8
    first, dead, last = run(calls.bereaved, RANKS, when, timeout=timeout, seconds=60, may_die=True)
    assert dead is None
    for rank, found in ((0, first), (2, last)):
        assert found is not None
        seconds, text = found
        assert seconds < timeout + 4  # s, of a busy machine
        assert text.startswith(f"context_parallel_swat: rank {rank} of its mesh lost the connection while ")
        assert "a rank has died" in text
