"""Decoding's compiled kernels, executed: a ring of keys, split over programs, and the sum of the splits."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("numpy")

from executed import LIMITS, relative

from swat_flex import tuned
from swat_flex.backends.triton import decode_op
from swat_flex.inspection import emulated

STEPS = [
    # target, new tokens, head dimension, (query, key heads), slots, window, tokens so far, splits
    ("sm_80", 1, 64, (4, 2), 192, 150, (500, 90), 2),
    ("sm_90", 1, 64, (4, 2), 192, 150, (500, 90), 2),
    ("sm_80", 5, 128, (4, 2), 192, 150, (500, 90), 1),
    ("sm_90", 3, 64, (6, 2), 300, 290, (1000, 200), 3),
]
REST = [
    ("sm_120", 1, 64, (40, 1), 192, 150, (500, 90), 1),
    ("sm_86", 1, 128, (16, 2), 1024, 1000, (5000, 700), 2),
    ("sm_89", 2, 80, (4, 4), 192, 150, (500, 90), 4),
    ("sm_90", 1, 256, (4, 2), 192, 150, (500, 90), 2),
]


def definition(q, keys, values, counts, slopes, bias, window):
    """The definition in float64: position p lies in slot p mod slots."""
    slots, tokens, group = keys.shape[2], q.shape[2], q.shape[1] // keys.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, count in enumerate(counts):
        position = torch.arange(max(count - window - tokens + 1, 0), count)
        distance = (count - tokens + torch.arange(tokens))[:, None] - position
        for h in range(q.shape[1]):
            k, v = (x[b, h // group, position % slots].double() for x in (keys, values))
            logits = q[b, h].double() @ k.T * q.shape[3] ** -0.5 + slopes[h].double() * distance + bias[h].double()
            out[b, h] = (torch.sigmoid(logits) * ((distance >= 0) & (distance < window))) @ v
    return out


@pytest.mark.parametrize(
    ("target", "tokens", "head_dim", "heads", "slots", "window", "counts", "splits"),
    [*STEPS, *(pytest.param(*step, marks=pytest.mark.slow) for step in REST)],
)
def test_a_step_computes_the_definition(target, tokens, head_dim, heads, slots, window, counts, splits):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    batch, (q_heads, kv_heads) = len(counts), heads
    q, keys, values = (
        draw(batch, q_heads, tokens, head_dim),
        *(draw(batch, kv_heads, slots, head_dim) for _ in range(2)),
    )
    slopes, bias = -torch.rand(q_heads, generator=generator) / 20, torch.randn(q_heads, generator=generator)
    for b, count in enumerate(counts):  # slots that no token has reached
        keys[b, :, count:], values[b, :, count:] = float("nan"), float("nan")
    rows = decode_op.row_tile(q_heads // kv_heads * tokens)
    default = decode_op.decode_configurations(rows, max(64, head_dim), 2)[0]
    config = dataclasses.replace(default, splits=splits)
    with tuned.using({decode_op.DECODE.name: config}), emulated(target) as ran:
        out = decode_op.decode(q, keys, values, torch.tensor(counts), slopes, bias, window, head_dim**-0.5)
    whole, row = relative(out, definition(q, keys, values, counts, slopes, bias, window))
    print(f"relative error {whole:.2e}, worst row {row:.2e}")
    assert whole < LIMITS[torch.bfloat16]
    assert row < 4 * LIMITS[torch.bfloat16]
    assert [launched.name for launched in ran] == ["decode_kernel", "sum_splits_kernel"][: 1 + (splits > 1)]
    assert all((launched.execution.writes["out"] == 1).all() for launched in ran)
