"""The call that the commands talk about: one sequence attending to itself."""

from __future__ import annotations

import torch

from swat_flex.problem import SwatProblem, WindowLike
from swat_flex.window import Window


def self_attention(
    heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device, window: WindowLike
) -> SwatProblem:
    """`flex_swat(q, k, v, window)` with q, k, v of shape `[1, heads, length, head_dim]`, to be differentiated."""
    return SwatProblem(
        batch=1,
        q_heads=heads,
        kv_heads=heads,
        q_len=length,
        kv_len=length,
        head_dim=head_dim,
        value_dim=head_dim,
        dtype=dtype,
        device_type=device.type,
        window=Window.of(window),
        activation="sigmoid",
        has_slopes=True,
        has_logit_bias=False,
        has_documents=False,
        needs_grad=True,
    )
