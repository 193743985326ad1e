"""The specification against examples worked by hand, and against torch's own attention where the two meet."""

import math

import pytest
import torch
import torch.nn.functional as F

from swat_flex import naive_swat


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def column(*values: float) -> torch.Tensor:
    """`[1, 1, L, 1]` float64."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)


def test_three_tokens_window_two_by_hand():
    q, k, v = column(1, 2, 3), column(1, -1, 2), column(10, 20, 30)
    slope, scale, bias = -0.5, 0.25, 0.1
    out = naive_swat(q, k, v, 2, slopes=torch.tensor([slope], dtype=torch.float64), scale=scale, logit_bias=bias)
    expected = [
        sigmoid(scale * 1 * 1 + bias) * 10,
        sigmoid(scale * 2 * 1 + slope + bias) * 10 + sigmoid(scale * 2 * -1 + bias) * 20,
        sigmoid(scale * 3 * -1 + slope + bias) * 20 + sigmoid(scale * 3 * 2 + bias) * 30,
    ]
    torch.testing.assert_close(out.flatten().tolist(), expected)


def test_zero_queries_weigh_every_visible_value_one_half():
    """σ(0) = ½ and nothing is normalised: two visible keys give ½(v_i + v_{i−1})."""
    v = column(1, 10, 100)
    out = naive_swat(torch.zeros_like(v), v, v, 2, slopes=None)
    assert out.flatten().tolist() == [0.5, 5.5, 55.0]


def test_default_scale_and_balanced_slopes():
    q, k, v = torch.randn(3, 1, 2, 5, 16, dtype=torch.float64).unbind()
    explicit = torch.tensor([-0.5, 0.5], dtype=torch.float64)
    assert torch.equal(naive_swat(q, k, v, 3), naive_swat(q, k, v, 3, slopes=explicit, scale=0.25))


def test_negative_slope_favours_recent_keys():
    v = column(1, 0, 0, 0)
    zero = torch.zeros_like(v)
    weight_of_the_oldest = {
        sign: naive_swat(zero, zero, v, 4, slopes=torch.tensor([sign * 0.5], dtype=torch.float64))[0, 0, 3, 0].item()
        for sign in (-1.0, 1.0)
    }
    assert weight_of_the_oldest == pytest.approx({-1.0: sigmoid(-1.5), 1.0: sigmoid(1.5)})


def test_the_bias_of_keys_ahead_counts_their_distance_too():
    v = column(0, 0, 1)
    zero = torch.zeros_like(v)
    out = naive_swat(zero, zero, v, (0, 2), slopes=torch.tensor([-1.0], dtype=torch.float64))
    torch.testing.assert_close(out.flatten().tolist(), [sigmoid(-2), sigmoid(-1), sigmoid(0)])


def test_fewer_queries_sit_at_the_end():
    q, k, v = torch.randn(3, 2, 2, 9, 4, dtype=torch.float64).unbind()
    assert torch.equal(naive_swat(q[:, :, 6:], k, v, 4), naive_swat(q, k, v, 4)[:, :, 6:])


def test_query_heads_share_key_heads_in_order():
    q = torch.randn(1, 4, 6, 4, dtype=torch.float64)
    k, v = torch.randn(2, 1, 2, 6, 4, dtype=torch.float64).unbind()
    slopes = torch.tensor([-0.1, -0.2, 0.3, 0.4], dtype=torch.float64)
    out = naive_swat(q, k, v, 3, slopes=slopes)
    for head in range(4):
        pair = slice(head // 2, head // 2 + 1)
        alone = naive_swat(q[:, head : head + 1], k[:, pair], v[:, pair], 3, slopes=slopes[head : head + 1])
        torch.testing.assert_close(out[:, head : head + 1], alone)


def test_documents_are_separate_calls_and_padding_is_zero():
    q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64).unbind()
    ids = torch.tensor([5, 5, 5, 5, 2, 2, -1, -3, -1])
    for activation in ("sigmoid", "softmax"):
        out = naive_swat(q, k, v, 3, document_ids=ids, activation=activation)
        for part in (slice(0, 4), slice(4, 6)):
            alone = naive_swat(q[:, :, part], k[:, :, part], v[:, :, part], 3, activation=activation)
            torch.testing.assert_close(out[:, :, part], alone)
        assert torch.equal(out[:, :, 6:], torch.zeros(1, 2, 3, 4, dtype=torch.float64))


def test_documents_may_interleave():
    q, k, v = torch.randn(3, 1, 1, 6, 4, dtype=torch.float64).unbind()
    ids = torch.tensor([0, 1, 0, 1, 0, 1])
    slope = torch.tensor([-0.5], dtype=torch.float64)
    out = naive_swat(q, k, v, None, document_ids=ids, slopes=slope)
    alone = naive_swat(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2], None, slopes=2 * slope)  # neighbours lie 2 apart
    torch.testing.assert_close(out[:, :, ::2], alone)


@pytest.mark.parametrize("window", [1, 3, None, (2, 1), (None, None)], ids=str)
def test_softmax_is_torchs_attention_with_mask_and_bias(window):
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64).unbind()
    slopes = torch.randn(4, dtype=torch.float64)
    d = torch.arange(7)[:, None] - torch.arange(7)
    left, right = window if isinstance(window, tuple) else (None if window is None else window - 1, 0)
    seen = (d <= (99 if left is None else left)) & (d >= -(99 if right is None else right))
    bias = (slopes[:, None, None] * d.abs()).masked_fill(~seen, float("-inf"))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(naive_swat(q, k, v, window, slopes=slopes, activation="softmax"), expected)


def test_a_softmax_row_that_sees_nothing_has_finite_gradients():
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    naive_swat(q, k, v, 2, document_ids=torch.tensor([-1, 0, 0]), activation="softmax").sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert torch.equal(q.grad[0, 0, 0], torch.zeros(2, dtype=torch.float64))


def test_hardware_tanh_is_refused():
    with pytest.raises(NotImplementedError, match="activation='tanh-sigmoid'"):
        naive_swat(*torch.randn(3, 1, 1, 2, 2).unbind(), 1, activation="tanh-sigmoid")
