"""The inputs that a problem is timed on."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from swat_flex.operands import Operands
from swat_flex.positions import slopes_of
from swat_flex.problem import Problem

SEED = 0
LOGIT_BIAS = -1.0  # the same work as any other


class Inputs:
    """Random tensors of a problem on its device, the same every time, made when first needed.

    Args:
        document_ids: `[B, Lk]` or `[Lk]`; None draws four documents where the problem has any.
    """

    def __init__(self, problem: Problem, document_ids: Tensor | None = None) -> None:
        self.problem, self._document_ids = problem, document_ids
        self.window = (problem.window.left, problem.window.right)
        self.scale = problem.head_dim**-0.5
        self._generator = torch.Generator(problem.device).manual_seed(SEED)

    def _draw(self, heads: int, length: int, width: int) -> Tensor:
        shape = (self.problem.batch, heads, length, width)
        return torch.randn(shape, generator=self._generator, device=self.problem.device, dtype=self.problem.dtype)

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        p = self.problem
        q = self._draw(p.q_heads, p.q_len, p.head_dim)
        k, v = (self._draw(p.kv_heads, p.kv_len, width) for width in (p.head_dim, p.value_dim))
        return q, k, v

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
            own = self._document_ids
            ids = (torch.arange(p.kv_len) * 4 // p.kv_len if own is None else own).to(q.device)
        return {
            "slopes": slopes_of("balanced", p.q_heads, q) if p.has_slopes else None,
            "logit_bias": torch.full((p.q_heads,), LOGIT_BIAS, device=q.device) if p.has_logit_bias else None,
            "document_ids": ids,
            "activation": p.activation,
        }

    @property
    def operands(self) -> Operands:
        """Return the call as a backend takes it."""
        return Operands(*self.qkv, window=self.problem.window, scale=self.scale, **self.options)
