"""Problems that people train and serve."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swat_flex.problem import Problem, WindowLike
from swat_flex.window import Window


@dataclass(frozen=True)
class Shape:
    """Self-attention, or its last `queries` rows.

    Attributes:
        batch: sequences.
        q_heads: heads of queries.
        kv_heads: heads of keys and values.
        length: keys, in tokens.
        head_dim: of keys and values.
        queries: None is all.
    """

    batch: int
    q_heads: int
    kv_heads: int
    length: int
    head_dim: int
    queries: int | None = None

    def problem(self, window: WindowLike, dtype: torch.dtype, device: torch.device, backward: bool) -> Problem:
        """With the default slopes, without bias and documents."""
        return Problem(
            batch=self.batch,
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            q_len=self.length if self.queries is None else self.queries,
            kv_len=self.length,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            dtype=dtype,
            device=device,
            window=Window.of(window),
            activation="sigmoid",
            has_slopes=True,
            has_logit_bias=False,
            has_documents=False,
            needs_grad=backward,
        )


@dataclass(frozen=True)
class Preset:
    """A named set of problems, each (shape, window), of `flex_swat` or of `swat_decode`."""

    cases: tuple[tuple[Shape, WindowLike], ...]
    dtype: torch.dtype
    backward: bool
    decode: bool = False


PRESETS = {
    # Llama-2- and Llama-3-like layers of 7B and 8B parameters, at 16k tokens a step.
    "train-7b": Preset(
        tuple((Shape(16384 // n, 32, heads, n, 128), window) for n in (4096, 16384) for heads in (32, 8)
              for window in (1024, 4096) if window < n),
        torch.bfloat16, backward=True,
    ),
    # One new token against a ring of `window` keys.
    "decode": Preset(
        tuple((Shape(batch, 32, 8, window, 128, queries=1), window) for batch in (1, 16, 128)
              for window in (1024, 4096)),
        torch.bfloat16, backward=False, decode=True,
    ),
    # 340M parameters as 16 heads of 64, at the paper's length; its text does not say which window: three.
    "paper-340m": Preset(
        tuple((Shape(8, 16, 16, 4096, 64), window) for window in (128, 512, 1024)), torch.bfloat16, backward=True,
    ),
}  # fmt: skip
