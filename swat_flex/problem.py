"""A call to `flex_swat` described by what decides how it runs: sizes, dtype, window, flags and device type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from swat_flex.window import Window

WindowLike = int | tuple[int | None, int | None] | None
Slopes = Literal["balanced", "alibi"] | Tensor | None
Activation = Literal["sigmoid", "softmax", "tanh-sigmoid"]
Backend = Literal["auto", "flex", "triton", "banded", "naive"]
Bucket = dict[str, str | int | bool | None]


@dataclass(frozen=True, slots=True)
class SwatProblem:
    """One call without its tensors. Lengths and head dimensions in elements, the window in tokens."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device_type: str
    window: Window
    activation: str
    has_slopes: bool
    has_logit_bias: bool
    has_documents: bool
    needs_grad: bool

    @classmethod
    def of_self_attention(
        cls, heads: int, length: int, head_dim: int, dtype: torch.dtype, device_type: str, window: WindowLike
    ) -> SwatProblem:
        """`flex_swat(q, k, v, window)` with q, k, v of shape `[1, heads, length, head_dim]`, to be differentiated."""
        return cls(
            batch=1,
            q_heads=heads,
            kv_heads=heads,
            q_len=length,
            kv_len=length,
            head_dim=head_dim,
            value_dim=head_dim,
            dtype=dtype,
            device_type=device_type,
            window=Window.of(window),
            activation="sigmoid",
            has_slopes=True,
            has_logit_bias=False,
            has_documents=False,
            needs_grad=True,
        )

    def flops(self, *, backward: bool = False) -> float:
        """Useful floating-point operations: exact visible pairs, documents apart; recomputation does not count.

        Forward 2·B·Hq·P·(D + Dv) with P = `Window.pairs`, backward 2.5 times that.
        """
        pairs = self.window.pairs(self.q_len, self.kv_len)
        forward = 2.0 * self.batch * self.q_heads * pairs * (self.head_dim + self.value_dim)
        return 2.5 * forward if backward else forward

    def bytes(self, *, backward: bool = False) -> int:
        """Least memory traffic in bytes: forward reads q, k, v and writes the output once each; backward reads
        q, k, v and the output's gradient and writes three gradients."""
        q = self.batch * self.q_heads * self.q_len
        kv = self.batch * self.kv_heads * self.kv_len
        inputs = q * self.head_dim + kv * (self.head_dim + self.value_dim)
        output = q * self.value_dim
        return self.dtype.itemsize * (2 * inputs + output if backward else inputs + output)

    def bucket(self) -> Bucket:
        """Tuning key: problems in one bucket share a configuration.

        Window sides round up to multiples of 64, batch·heads and lengths to powers of two; all else is exact.
        """
        return {
            "batch_heads": _power_of_two(self.batch * self.q_heads),
            "group": self.q_heads // self.kv_heads,
            "q_len": _power_of_two(self.q_len),
            "kv_len": _power_of_two(self.kv_len),
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "left": _multiple_of_64(self.window.left),
            "right": _multiple_of_64(self.window.right),
            "activation": self.activation,
            "slopes": self.has_slopes,
            "logit_bias": self.has_logit_bias,
            "documents": self.has_documents,
        }


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _multiple_of_64(side: int | None) -> int | None:
    return None if side is None else -(-side // 64) * 64
