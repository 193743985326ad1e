"""Problems that people train and serve."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from swat_flex.problem import Problem, WindowLike

Sizes = tuple[int, int, int, int, int]  # batch, query heads, key heads, keys, head dimension


def self_attention(
    sizes: Sizes,
    window: WindowLike,
    dtype: torch.dtype,
    device: torch.device,
    backward: bool,
    queries: int | None = None,
) -> Problem:
    """Describe self-attention, or its last `queries` rows, with the default slopes."""
    batch, q_heads, kv_heads, length, head_dim = sizes
    made = Problem.of_self_attention(q_heads, length, head_dim, dtype, device, window)
    q_len = length if queries is None else queries
    return replace(made, batch=batch, kv_heads=kv_heads, q_len=q_len, needs_grad=backward)


@dataclass(frozen=True)
class ShapeSet:
    """Sizes and windows that are tuned together, of `flex_swat` or, one token at a time, of `swat_decode`."""

    cases: tuple[tuple[Sizes, WindowLike], ...]
    dtype: torch.dtype
    backward: bool
    decode: bool = False


SHAPE_SETS = {
    # Llama-2- and Llama-3-like layers of 7B and 8B parameters, at 16k tokens a step.
    "train-7b": ShapeSet(
        tuple(((16384 // n, 32, heads, n, 128), window) for n in (4096, 16384) for heads in (32, 8)
              for window in (1024, 4096) if window < n),
        torch.bfloat16, backward=True,
    ),
    # One new token against a ring of `window` keys.
    "decode": ShapeSet(
        tuple(((batch, 32, 8, window, 128), window) for batch in (1, 16, 128)
              for window in (1024, 4096)),
        torch.bfloat16, backward=False, decode=True,
    ),
    # 340M parameters as 16 heads of 64, at the paper's length; its text does not say which window: three.
    "paper-340m": ShapeSet(
        tuple(((8, 16, 16, 4096, 64), window) for window in (128, 512, 1024)), torch.bfloat16, backward=True,
    ),
}  # fmt: skip
