"""`context_parallel_swat` over the backends that a CPU has for tests alone."""

import pytest
import torch
import torch.distributed as dist
from cases import exact_of, rough_of, swat_case
from ranks import run
from shards_of_a_case import Sharded, run_all, whole

from swat_flex.distributed import context_parallel_swat
from swat_flex.testing.budget import ENOUGH, assert_within_budget, exact_swat, rough_swat

pytestmark = pytest.mark.xdist_group("processes")

LENGTHS = (40, 24)
INTERPRETED = [
    Sharded(swat_case(64, 20, 2, 16, dtype="float32", kv_heads=1, documents="packed"), LENGTHS, "triton"),
    Sharded(swat_case(64, (30, 9), 1, 16, 24, dtype="float32", kv_heads=1, logit_bias="tensor"), LENGTHS, "triton"),
]


@pytest.mark.slow  # fresh processes that compile for the interpreter
def test_triton_in_its_interpreter_is_within_budget(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for sharded, of_ranks in zip(INTERPRETED, zip(*run(run_all, 2, INTERPRETED, fresh=True), strict=True), strict=True):
        assert not any(isinstance(x, str) for x in of_ranks), of_ranks
        case = sharded.case
        actual, exact, rough = whole([found for found, _ in of_ranks]), exact_of(case), rough_of(case)
        for name, expected in exact.items():
            if expected.numel() >= ENOUGH:
                assert_within_budget(actual[name], exact=expected, rough=rough[name], name=name)


COMPILED = Sharded(swat_case(256, 60, 2, 16, dtype="float32", documents="packed"), (96, 160))


def compiled(rank):
    (q, k, v), _, options = COMPILED.local(rank)
    with torch.no_grad():
        return context_parallel_swat(q, k, v, 60, mesh=dist.group.WORLD, backend="flex", **options)


@pytest.mark.slow
def test_flex_forward_is_within_budget():
    case = COMPILED.case
    actual = torch.cat(run(compiled, 2), 2)
    inputs, options = case.tensors(), case.options()
    exact, rough = exact_swat(*inputs, 60, **options), rough_swat(*inputs, 60, **options)
    assert_within_budget(actual, exact=exact, rough=rough, window=60)
