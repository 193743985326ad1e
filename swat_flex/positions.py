"""Where tokens are: slope schedules of the linear bias, rotary embedding, document ids.

Sign convention: a slope is added per token of distance, `slopes[h] · |i − j|`. Negative favours recent keys, positive
favours old ones. FlashAttention's `alibi_slopes` carries the opposite sign.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from swat_flex.tracing import can_cache, is_traced

Schedule = Literal["2^-8k/h", "2^-k"]


def balanced_alibi_slopes(
    heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Half the heads favour recent keys, half old ones: −2^−k, then +2^−k, each half counting k from 1.

    An odd head count gives the negative half one more. Returns `[heads]`, logits per token of distance.
    Source: SWAT, arXiv 2502.18845, Eq. 4.

    >>> balanced_alibi_slopes(4)
    tensor([-0.5000, -0.2500,  0.5000,  0.2500])
    """
    return alibi_slopes(heads, positive=heads // 2, schedule="2^-k", device=device, dtype=dtype)


def alibi_slopes(
    heads: int,
    *,
    positive: int = 0,
    schedule: Schedule = "2^-8k/h",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Slopes of the linear bias: `heads − positive` negative ones first, then `positive` positive ones.

    Each sign is a schedule of its own over its h heads, k = 1…h: magnitude 2^(−8k/h) (ALiBi, arXiv 2108.12409) or 2^−k
    (SWAT, arXiv 2502.18845, Eq. 4). Works for any head count. Returns `[heads]`, logits per token of distance.

    Raises:
        ValueError: heads < 1, positive outside 0…heads, or an unknown schedule.

    >>> alibi_slopes(3, positive=1, schedule="2^-k")
    tensor([-0.5000, -0.2500,  0.5000])
    """
    if heads < 1:
        raise ValueError(f"heads: expected at least 1, got {heads}")
    if not 0 <= positive <= heads:
        raise ValueError(f"positive: expected 0 to heads = {heads}, got {positive}")
    if schedule not in ("2^-8k/h", "2^-k"):
        raise ValueError(f"schedule: expected '2^-8k/h' or '2^-k', got {schedule!r}")
    negative = heads - positive
    k = torch.arange(1, heads + 1, device=device, dtype=dtype)
    is_positive = k > negative
    k = torch.where(is_positive, k - negative, k)
    if schedule == "2^-8k/h":
        k = k * torch.where(is_positive, 8 / max(positive, 1), 8 / max(negative, 1))
    magnitude = torch.exp2(-k)
    return torch.where(is_positive, magnitude, -magnitude)


@torch.no_grad()
def unit_logit_bias(slopes: Tensor, window: int, total: float = 1.0) -> Tensor:
    """The logit bias with which each head's weights sum to total where its scores are 0: Σ σ(slope·d + bias) = total
    over the distances 0 ≤ d < window.

    With a total of 1 a sigmoid starts as a softmax does, whatever the slope. Without a bias a row's weights sum to far
    more than 1, and a uniform −log(window) leaves a steep head next to nothing.

    Args:
        slopes: `[heads]`, logits per token of distance; negative favours recent keys.
        window: keys per query, its own included, at least 2: the weight of a single key stays below 1.
        total: over 0, at most 1.

    Returns:
        `[heads]` in slopes' dtype, found by bisection in float64, without a gradient.

    Raises:
        ValueError: an argument that breaks a rule above.

    >>> bias = unit_logit_bias(torch.tensor([-0.5, 0.0]), 3)
    >>> torch.sigmoid(torch.tensor([[-0.0, -0.5, -1.0], [0.0, 0.0, 0.0]]) + bias[:, None]).sum(1)
    tensor([1.0000, 1.0000])
    """
    if slopes.dim() != 1 or not slopes.is_floating_point():
        raise ValueError(f"slopes: expected floats [heads], got {slopes.dtype} of shape {list(slopes.shape)}")
    if window < 2:
        raise ValueError(f"window: expected at least 2, as the weight of a single key stays below 1, got {window}")
    if not 0 < total <= 1:
        raise ValueError(f"total: expected a number over 0 and at most 1, got {total}")
    x = slopes.double()[:, None] * torch.arange(window, device=slopes.device, dtype=torch.float64)  # [heads, window]
    low = math.log(total) - x.logsumexp(1)  # σ(x) < e^x: the sum is below total
    high = -torch.where(slopes < 0, x[:, 1], x[:, -2])  # two weights are at least ½: the sum is at least 1
    for _ in range(56):
        middle = (low + high) / 2
        is_low = torch.sigmoid(x + middle[:, None]).sum(1) < total
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return high.to(slopes.dtype)


def apply_rope(x: Tensor, positions: Tensor | None = None, *, base: float = 10000.0) -> Tensor:
    """Rotary embedding in the rotate-half form of Llama: channel d turns with channel d + D/2.

    Args:
        x: `[B, H, L, D]`, D even. Angles, sines and the rotation are computed in float32 (float64 when x is).
        positions: `[L]` or `[B, L]`, tokens; None counts 0…L−1.
        base: wavelength base; channel pair d turns by `positions · base^(−2d/D)` radians.

    Returns:
        `[B, H, L, D]` in x's dtype.

    Raises:
        ValueError: odd D, or positions whose shape does not fit.

    Source: RoFormer, arXiv 2104.09864; SWAT, arXiv 2502.18845, Eq. 5.
    """
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x: expected shape [B, H, L, D] with D even, got {list(x.shape)}")
    batch, _, length, dim = x.shape
    if positions is None:
        positions = torch.arange(length, device=x.device)
    elif tuple(positions.shape) not in ((length,), (batch, length)):
        raise ValueError(f"positions: expected shape [{length}] or [{batch}, {length}], got {list(positions.shape)}")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, device=x.device, dtype=compute) / dim)
    angles = (positions.to(compute)[..., None] * frequencies).unsqueeze(-3)  # [..., 1, L, D/2]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(compute).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def document_ids_from_cu_seqlens(cu_seqlens: Tensor, length: int) -> Tensor:
    """Document ids `[length]` of one packed row from the cumulative lengths of variable-length attention.

    Args:
        cu_seqlens: int `[N + 1]`, 0 first, non-decreasing: document n holds tokens cu_seqlens[n] ≤ i < cu_seqlens[n+1].
        length: tokens in the row; those from cu_seqlens[N] on are padding, id −1.

    Returns:
        int32 `[length]`, built on cu_seqlens' device without synchronisation.

    >>> document_ids_from_cu_seqlens(torch.tensor([0, 2, 3]), 5)
    tensor([ 0,  0,  1, -1, -1], dtype=torch.int32)
    """
    shape = list(cu_seqlens.shape)
    if len(shape) != 1 or shape[0] < 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens: expected int [N + 1], got {cu_seqlens.dtype} of shape {shape}")
    ends = cu_seqlens[1:].contiguous()
    token = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ids = torch.searchsorted(ends, token, right=True, out_int32=True)
    return torch.where(token < cu_seqlens[-1], ids, -1)


def document_ids_from_attention_mask(attention_mask: Tensor) -> Tensor:
    """Document ids `[B, L]` from a padding mask: 0 or False is padding (id −1), anything else is a document.

    Args:
        attention_mask: bool or int `[B, L]`; a packed mask that numbers its documents 1, 2, … keeps them apart.

    >>> document_ids_from_attention_mask(torch.tensor([[0, 1, 1, 2]]))
    tensor([[-1,  0,  0,  1]], dtype=torch.int32)
    """
    if attention_mask.dim() != 2 or attention_mask.is_floating_point():
        raise ValueError(
            "attention_mask: expected a bool or int tensor of shape [B, L], got "
            f"{attention_mask.dtype} of shape {list(attention_mask.shape)}"
        )
    return attention_mask.to(torch.int32) - 1


def per_head_dtype(q: Tensor) -> torch.dtype:
    """dtype of slopes, logit_bias and their gradients: float64 where q is, else float32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def slopes_of(slopes: Literal["balanced", "alibi"] | Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    """Resolve the argument `slopes` of `flex_swat`: `[heads]` on `like`'s device in its `per_head_dtype`, or None.

    Named slopes are made once for each device and number of heads.
    """
    if slopes is None or isinstance(slopes, Tensor):
        return slopes
    make = balanced_alibi_slopes if slopes == "balanced" else alibi_slopes
    dtype = per_head_dtype(like)
    if is_traced(like):
        return make(heads, device=like.device, dtype=dtype)
    key = (slopes, heads, like.device, dtype)
    made = _made.get(key)
    if made is None:
        made = make(heads, device=like.device, dtype=dtype)
        if can_cache(made) and len(_made) < 256:
            _made[key] = made
    return made


_made: dict[tuple[str, int, torch.device, torch.dtype], Tensor] = {}
