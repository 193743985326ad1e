"""`Problem`: a call described by what decides how it runs: sizes, dtype, device, window and flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from swat_flex.tracing import is_traced
from swat_flex.window import Window

WindowLike = int | tuple[int | None, int | None] | None
Slopes = Literal["balanced", "alibi"] | Tensor | None
Activation = Literal["sigmoid", "softmax", "tanh-sigmoid"]
Backend = Literal["auto", "flex", "triton", "cpp", "banded", "naive"]
Bucket = dict[str, str | int | bool | None]


NO_HARDWARE_TANH = "activation='tanh-sigmoid' is a GPU's hardware tanh, which only the triton backend uses"


@dataclass(frozen=True, slots=True)
class Problem:
    """One call without its tensors. Lengths and head dimensions in elements, the window in tokens.

    Attributes:
        needs_grad: whether a gradient of any input is wanted.
        learns_bias: whether one of them is that of slopes or logit_bias.
        threads: torch's threads on a CPU, where a configuration depends on them; 0 elsewhere.
        traced: sizes may be symbols, so that nothing may be looked up by them or compared with them.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: Window
    activation: str = "sigmoid"
    has_slopes: bool = True
    has_logit_bias: bool = False
    has_documents: bool = False
    needs_grad: bool = False
    learns_bias: bool = False
    threads: int = 0
    traced: bool = False

    @classmethod
    def of_self_attention(
        cls, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device | str, window: WindowLike
    ) -> Problem:
        """Describe `flex_swat(q, k, v, window)` of q, k, v `[1, heads, length, head_dim]`, to be differentiated."""
        sizes: dict[str, Any] = {"batch": 1, "q_heads": heads, "kv_heads": heads, "q_len": length, "kv_len": length}
        sizes |= {"head_dim": head_dim, "value_dim": head_dim}
        return cls(**sizes, dtype=dtype, device=torch.device(device), window=Window.of(window), needs_grad=True)

    @classmethod
    def of_step(
        cls, q: Tensor, keys: Tensor, values: Tensor, window: int, slopes: object, logit_bias: object
    ) -> Problem:
        """Describe a step of decoding: T queries and a ring, of which they see window + T − 1 keys at most."""
        batch, q_heads, tokens, head_dim = q.shape
        return cls(
            batch=batch,
            q_heads=q_heads,
            kv_heads=keys.shape[1],
            q_len=tokens,
            kv_len=window + tokens - 1,
            head_dim=head_dim,
            value_dim=values.shape[3],
            dtype=q.dtype,
            device=q.device,
            window=Window.of(window),
            has_slopes=slopes is not None,
            has_logit_bias=logit_bias is not None,
            traced=is_traced(q),
        )

    def __str__(self) -> str:
        queries = "" if self.q_len == self.kv_len else f"{self.q_len:,} of "
        value = "" if self.value_dim == self.head_dim else f"/{self.value_dim}"
        heads = f"H{self.q_heads}" if self.q_heads == self.kv_heads else f"H{self.q_heads}/{self.kv_heads}"
        left, right = self.window.left, self.window.right
        window = "none" if (left, right) == (None, 0) else f"{left},{right}"
        if right == 0 and left is not None:
            window = f"{left + 1}"
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"L{queries}{self.kv_len:,} D{self.head_dim}{value}"
        return f"B{self.batch} {heads} {sizes} window {window} {dtype}"

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q_heads // self.kv_heads

    def flops(self, *, backward: bool = False) -> float:
        """Count useful floating-point operations: exact visible pairs, documents apart; recomputation does not count.

        Forward 2·B·Hq·P·(D + Dv) with P = `Window.pairs`, backward 2.5 times that.
        """
        pairs = self.window.pairs(self.q_len, self.kv_len)
        forward = 2.0 * self.batch * self.q_heads * pairs * (self.head_dim + self.value_dim)
        return 2.5 * forward if backward else forward

    def bytes(self, *, backward: bool = False) -> int:
        """Count the least memory traffic in bytes: forward reads q, k, v and writes the output once each; backward
        reads q, k, v and the output's gradient and writes three gradients."""
        q = self.batch * self.q_heads * self.q_len
        kv = self.batch * self.kv_heads * self.kv_len
        inputs = q * self.head_dim + kv * (self.head_dim + self.value_dim)
        output = q * self.value_dim
        return self.dtype.itemsize * (2 * inputs + output if backward else inputs + output)

    def bucket(self) -> Bucket:
        """Return the tuning key: problems in one bucket share a configuration.

        Window sides round up to multiples of 64, batch·heads and lengths to powers of two; all else is exact.
        """
        return {
            "batch_heads": _power_of_two(self.batch * self.q_heads),
            "group": self.group,
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
