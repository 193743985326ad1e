"""The problem that is tuned, and the inputs it is timed on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from swat_flex.operands import Operands
from swat_flex.positions import slopes_of
from swat_flex.problem import Problem

SEED = 0
LOGIT_BIAS = -1.0  # the same work as any other


@dataclass(frozen=True)
class Spec:
    """A problem on a device; small enough to be sent to another process.

    Attributes:
        problem: `needs_grad` tells whether the backward is tuned too.
        device: "cpu", "cuda:0".
        document_ids: on the CPU, `[B, Lk]` or `[Lk]`; None draws four documents where the problem has any.
        decode: a step of `swat_decode`, of q_len new tokens and the kv_len = window + q_len − 1 keys they see.
    """

    problem: Problem
    device: str
    document_ids: Tensor | None = None
    decode: bool = False

    def __str__(self) -> str:
        p = self.problem
        queries = "" if p.q_len == p.kv_len else f"{p.q_len:,} of "
        value = "" if p.value_dim == p.head_dim else f"/{p.value_dim}"
        heads = f"H{p.q_heads}" if p.q_heads == p.kv_heads else f"H{p.q_heads}/{p.kv_heads}"
        left, right = p.window.left, p.window.right
        window = "none" if (left, right) == (None, 0) else f"{left},{right}"
        if right == 0 and left is not None:
            window = f"{left + 1}"
        dtype = str(p.dtype).removeprefix("torch.")
        return f"B{p.batch} {heads} L{queries}{p.kv_len:,} D{p.head_dim}{value} window {window} {dtype}"

    def bytes(self) -> int:
        """Least memory of one call: inputs and results, gradients included."""
        return self.problem.bytes() + (self.problem.bytes(backward=True) if self.problem.needs_grad else 0)


class Inputs:
    """Random tensors of a spec, the same every time, made when first needed."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.problem = spec, spec.problem
        self._generator = torch.Generator(spec.device).manual_seed(SEED)

    def _draw(self, heads: int, length: int, width: int) -> Tensor:
        shape = (self.problem.batch, heads, length, width)
        return torch.randn(shape, generator=self._generator, device=self.spec.device, dtype=self.problem.dtype)

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        return (
            self._draw(p.q_heads, p.q_len, p.head_dim),
            self._draw(p.kv_heads, p.kv_len, p.head_dim),
            self._draw(p.kv_heads, p.kv_len, p.value_dim),
        )

    @cached_property
    def ring(self) -> tuple[Tensor, Tensor, Tensor]:
        """(keys, values, length) of a full ring that holds k and v, and wraps in another slot in each row."""
        _, k, v = self.qkv
        slots = k.shape[2]
        length = slots + (torch.arange(k.shape[0]) * 37 + slots // 3) % slots
        keys, values = (torch.stack([x.roll(n, 1) for x, n in zip(xs, length.tolist(), strict=True)]) for xs in (k, v))
        return keys, values, length.to(k.device)

    @cached_property
    def grad(self) -> Tensor:
        """The output's gradient."""
        return self._draw(self.problem.q_heads, self.problem.q_len, self.problem.value_dim)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of the call, all of them tensors but the activation."""
        p, q = self.problem, self.qkv[0]
        ids = None
        if p.has_documents:
            ids = self.spec.document_ids
            ids = torch.arange(p.kv_len) * 4 // p.kv_len if ids is None else ids
            ids = ids.to(q.device)
        return {
            "slopes": slopes_of("balanced", p.q_heads, q) if p.has_slopes else None,
            "logit_bias": torch.full((p.q_heads,), LOGIT_BIAS, device=q.device) if p.has_logit_bias else None,
            "document_ids": ids,
            "activation": p.activation,
        }

    @property
    def operands(self) -> Operands:
        """Return the call as a backend takes it."""
        return Operands(*self.qkv, window=self.problem.window, scale=self.problem.head_dim**-0.5, **self.options)
