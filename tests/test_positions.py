import math
import re

import pytest
import torch

from swat_flex import (
    alibi_slopes,
    apply_rope,
    balanced_alibi_slopes,
    document_ids_from_attention_mask,
    document_ids_from_cu_seqlens,
    unit_logit_bias,
)


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def test_balanced_slopes_are_equation_four():
    assert balanced_alibi_slopes(6).tolist() == [-1 / 2, -1 / 4, -1 / 8, 1 / 2, 1 / 4, 1 / 8]


def test_balanced_slopes_of_an_odd_head_count_favour_recent_keys_once_more():
    assert balanced_alibi_slopes(5).tolist() == [-1 / 2, -1 / 4, -1 / 8, 1 / 2, 1 / 4]
    assert balanced_alibi_slopes(1).tolist() == [-1 / 2]


def test_alibi_slopes_are_the_published_ones_with_the_sign_turned():
    published = [2 ** (-8 * k / 8) for k in range(1, 9)]  # ALiBi, arXiv 2108.12409: 1/2, 1/4, …, 1/256
    assert alibi_slopes(8).tolist() == [-s for s in published]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor([-(2 ** (-8 * k / 12)) for k in range(1, 13)]))


@pytest.mark.parametrize("schedule", ["2^-8k/h", "2^-k"])
@pytest.mark.parametrize("positive", [0, 4, 6, 12])
def test_each_sign_is_a_schedule_of_its_own(schedule, positive):
    """The paper's 12:0, 8:4 and 6:6 splits."""
    slopes = alibi_slopes(12, positive=positive, schedule=schedule)
    negative = 12 - positive
    if negative:
        assert torch.equal(slopes[:negative], alibi_slopes(negative, schedule=schedule))
    if positive:
        assert torch.equal(slopes[negative:], -alibi_slopes(positive, schedule=schedule))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads: expected at least 1, got 0"),
        ({"heads": 4, "positive": 5}, "positive: expected 0 to heads = 4, got 5"),
        ({"heads": 4, "positive": -1}, "positive: expected 0 to heads = 4, got -1"),
        ({"heads": 4, "schedule": "linear"}, "schedule: expected '2^-8k/h' or '2^-k', got 'linear'"),
    ],
)
def test_slope_errors_name_argument_rule_and_value(arguments, message):
    with pytest.raises(ValueError, match=exactly(message)):
        alibi_slopes(**arguments)


@pytest.mark.parametrize("window", [2, 3, 64, 257, 4096])
@pytest.mark.parametrize("positive", [0, 6, 12])
@pytest.mark.parametrize("schedule", ["2^-8k/h", "2^-k"])
def test_the_unit_bias_makes_every_heads_weights_sum_to_one(window, positive, schedule):
    slopes = alibi_slopes(12, positive=positive, schedule=schedule, dtype=torch.float64)
    slopes = torch.cat((slopes, torch.tensor([0.0, -30.0, 30.0], dtype=torch.float64)))
    bias = unit_logit_bias(slopes, window)
    sums = torch.sigmoid(slopes[:, None] * torch.arange(window) + bias[:, None]).sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-11)
    torch.testing.assert_close(unit_logit_bias(slopes.float(), window), bias.float())


@pytest.mark.parametrize("total", [1e-6, 1 / 16, 0.5])
def test_the_weights_sum_to_the_total_asked_for(total):
    slopes = torch.tensor([-30.0, -0.5, 0.0, 0.25, 30.0], dtype=torch.float64)
    bias = unit_logit_bias(slopes, 64, total)
    sums = torch.sigmoid(slopes[:, None] * torch.arange(64) + bias[:, None]).sum(1)
    torch.testing.assert_close(sums, torch.full_like(sums, total), rtol=1e-9, atol=0)


def test_the_unit_bias_by_hand():
    """A level head's is the logit of 1 / window; two keys of one steep head share the weight."""
    level, steep = unit_logit_bias(torch.tensor([0.0, -4.0]), 2).tolist()
    assert level == pytest.approx(0)  # σ(0) + σ(0)
    assert steep == pytest.approx(2)  # σ(2) + σ(−2)
    assert unit_logit_bias(torch.zeros(1), 64).item() == pytest.approx(-math.log(63))
    assert not unit_logit_bias(torch.zeros(1, requires_grad=True), 64).requires_grad


@pytest.mark.parametrize(
    ("slopes", "window", "total", "message"),
    [
        (torch.zeros(2, 2), 4, 1, "slopes: expected floats [heads], got torch.float32 of shape [2, 2]"),
        (torch.zeros(2, dtype=torch.int64), 4, 1, "slopes: expected floats [heads], got torch.int64 of shape [2]"),
        (torch.zeros(2), 1, 1, "window: expected at least 2, as the weight of a single key stays below 1, got 1"),
        (torch.zeros(2), 4, 0, "total: expected a number over 0 and at most 1, got 0"),
        (torch.zeros(2), 4, 1.5, "total: expected a number over 0 and at most 1, got 1.5"),
        (torch.zeros(2), 4, math.nan, "total: expected a number over 0 and at most 1, got nan"),
    ],
)
def test_unit_bias_errors(slopes, window, total, message):
    with pytest.raises(ValueError, match=exactly(message)):
        unit_logit_bias(slopes, window, total)


def rotated(x: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """The definition: the pair (x_d, x_{d + D/2}) as a complex number, turned by position · base^(−2d/D)."""
    x = x.double()
    half = x.shape[-1] // 2
    pair = torch.complex(x[..., :half], x[..., half:])
    position = torch.arange(x.shape[-2], dtype=torch.float64)[:, None]
    angle = position * base ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    turned = pair * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def test_rope_turns_pairs_by_hand():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]).view(1, 1, 3, 2)
    expected = [[1, 0], [math.cos(1), math.sin(1)], [-2 * math.sin(2), 2 * math.cos(2)]]
    torch.testing.assert_close(apply_rope(x)[0, 0], torch.tensor(expected))


@pytest.mark.parametrize(("dim", "base"), [(2, 10000.0), (64, 10000.0), (80, 500000.0)])
def test_rope_is_a_rotation_of_complex_pairs(dim, base):
    x = torch.randn(2, 3, 257, dim)
    torch.testing.assert_close(apply_rope(x, base=base).double(), rotated(x, base), atol=5e-5, rtol=0)
    exact = apply_rope(x.double(), base=base)
    torch.testing.assert_close(exact, rotated(x, base), atol=1e-12, rtol=0)


def test_rope_equals_llama_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=4 * 64, num_attention_heads=4, max_position_embeddings=2048)
    q, k = torch.randn(2, 2, 4, 1000, 64).unbind()
    positions = torch.arange(1000)[None]
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    for ours, theirs in zip((apply_rope(q), apply_rope(k)), llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)


def test_rope_takes_positions_per_row_and_keeps_the_dtype():
    x = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    out = apply_rope(x, positions)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out[0], apply_rope(x[:1])[0])
    assert torch.equal(out[1], apply_rope(x[1:], positions[1])[0])


def test_rope_makes_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64).unbind()

    def score(i: int, j: int) -> torch.Tensor:
        return (apply_rope(q, torch.tensor([i])) * apply_rope(k, torch.tensor([j]))).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100))


@pytest.mark.parametrize(
    ("x", "positions", "message"),
    [
        (torch.zeros(1, 1, 4, 3), None, "x: expected shape [B, H, L, D] with D even, got [1, 1, 4, 3]"),
        (torch.zeros(4, 4), None, "x: expected shape [B, H, L, D] with D even, got [4, 4]"),
        (torch.zeros(2, 1, 4, 2), torch.zeros(5), "positions: expected shape [4] or [2, 4], got [5]"),
    ],
)
def test_rope_errors(x, positions, message):
    with pytest.raises(ValueError, match=exactly(message)):
        apply_rope(x, positions)


def test_ids_from_cu_seqlens():
    ids = document_ids_from_cu_seqlens(torch.tensor([0, 3, 3, 4, 6], dtype=torch.int32), 8)
    assert ids.tolist() == [0, 0, 0, 2, 3, 3, -1, -1]
    assert ids.dtype == torch.int32
    assert document_ids_from_cu_seqlens(torch.tensor([0]), 2).tolist() == [-1, -1]


def test_ids_from_attention_mask():
    assert document_ids_from_attention_mask(torch.tensor([[0, 1, 1], [1, 2, 0]])).tolist() == [[-1, 0, 0], [0, 1, -1]]
    assert document_ids_from_attention_mask(torch.tensor([[True, False]])).tolist() == [[0, -1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: document_ids_from_cu_seqlens(torch.zeros(2, 2), 4), "cu_seqlens: expected int [N + 1]"),
        (lambda: document_ids_from_cu_seqlens(torch.zeros(2), 4), "got torch.float32 of shape [2]"),
        (lambda: document_ids_from_attention_mask(torch.ones(3)), "attention_mask: expected a bool or int tensor"),
    ],
)
def test_id_errors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
