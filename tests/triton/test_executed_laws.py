"""What the compiled code must keep to the bit, executed: a row depends on the keys it sees, and on nothing else."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("numpy")

from executed import Call

KEY, QUERY = 133, 200  # in the middle of tiles
TARGETS, DIMS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120"), (16, 32, 64, 128, 256)
VALUES = [float("nan"), float("inf"), -1e4]
SAMPLE = [("sm_80", 128, float("nan")), ("sm_90", 64, -1e4)]
REST = [x for x in itertools.product(TARGETS, DIMS, VALUES) if str(x) not in map(str, SAMPLE)]


def every(sample, rest):
    return [*sample, *(pytest.param(*x, marks=pytest.mark.slow) for x in rest)]


def wide(head_dim):
    """Tiles without masks, several heads and ragged ends; a window that ends inside of tiles."""
    return Call(length=330, window=150, head_dim=head_dim)


def assert_unchanged(found, before, rows, names):
    """Hold tensors to the same bits in these rows, `[L]`."""
    for name in names:
        same = (found[name] == before[name]).all(-1).all(1)[0] | ~rows
        assert same.all(), f"{name}: rows {(~same).nonzero().flatten().tolist()[:20]}"


@pytest.mark.parametrize(("target", "head_dim", "value"), every(SAMPLE[:1], [SAMPLE[1], *REST]))
def test_a_key_changes_only_the_rows_that_see_it(target, head_dim, value):
    """And of the gradients of keys only its own. A key that is not finite may reach dq of rows that share its tile."""
    call = wide(head_dim)
    inputs, token = call.inputs(), torch.arange(call.length)
    before, _ = call.execute(target, inputs)
    inputs["k"][:, :, KEY] = value
    inputs["v"][:, :, KEY] *= -0.5
    after, _ = call.execute(target, inputs)
    unseen = (token < KEY) | (token >= KEY + call.window)
    assert_unchanged(after, before, unseen, ["out", "dq"] if math.isfinite(value) else ["out"])
    assert_unchanged(after, before, token != KEY, ["dk", "dv"])
    assert not torch.equal(after["out"], before["out"])


@pytest.mark.parametrize(("target", "head_dim", "value"), every(SAMPLE[1:], [SAMPLE[0], *REST]))
def test_a_query_changes_only_its_row_and_the_keys_that_it_sees(target, head_dim, value):
    """A query that is not finite may reach dk of keys that share its tile."""
    call = wide(head_dim)
    inputs, token = call.inputs(), torch.arange(call.length)
    before, _ = call.execute(target, inputs)
    inputs["q"][:, :, QUERY] = value
    after, _ = call.execute(target, inputs)
    assert_unchanged(after, before, token != QUERY, ["out", "dq"])
    unseen = (token > QUERY) | (token <= QUERY - call.window)
    assert_unchanged(after, before, unseen, ["dk", "dv"] if math.isfinite(value) else ["dv"])
    assert not torch.equal(after["dk"], before["dk"])


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_runs_repeat_to_the_bit(target):
    call = Call(length=200, window=150, per_head=True, heads=4, kv_heads=2)
    first, second = (call.execute(target)[0] for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
