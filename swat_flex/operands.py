"""`Operands`: what a backend computes with, once the user's arguments are checked and resolved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swat_flex.problem import Problem
from swat_flex.tracing import is_traced
from swat_flex.window import Window


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The tensors and numbers of one call. `validation.resolve` makes it from the arguments of `flex_swat`.

    Attributes:
        q: `[B, Hq, Lq, D]`.
        k: `[B, Hkv, Lk, D]`.
        v: `[B, Hkv, Lk, Dv]`.
        slopes: `[Hq]` logits per token of distance, or None; float32, float64 where q is, as logit_bias.
        logit_bias: `[Hq]` logits, or None.
        document_ids: int `[B, Lk]` or `[Lk]`, or None.
        window: which keys a query sees.
        scale: factor on ⟨q, k⟩.
        activation: "sigmoid", "softmax" or "tanh-sigmoid".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None
    logit_bias: Tensor | None
    document_ids: Tensor | None
    window: Window
    scale: float
    activation: str

    def problem(self) -> Problem:
        """Describe the call without its tensors."""
        q, k, traced = self.q, self.k, is_traced(self.q)
        batch, q_heads, q_len, head_dim = q.shape
        learns_bias = torch.is_grad_enabled() and _any_requires_grad(self.slopes, self.logit_bias)
        return Problem(
            batch=batch,
            q_heads=q_heads,
            kv_heads=k.shape[1],
            q_len=q_len,
            kv_len=k.shape[2],
            head_dim=head_dim,
            value_dim=self.v.shape[3],
            dtype=q.dtype,
            device=q.device,
            window=self.window,
            activation=self.activation,
            has_slopes=self.slopes is not None,
            has_logit_bias=self.logit_bias is not None,
            has_documents=self.document_ids is not None,
            needs_grad=learns_bias or (torch.is_grad_enabled() and _any_requires_grad(q, k, self.v)),
            learns_bias=learns_bias,
            threads=0 if traced or q.device.type != "cpu" else torch.get_num_threads(),
            traced=traced,
        )


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)
