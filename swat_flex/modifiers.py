"""SWAT as FlexAttention modifiers: log-sigmoid scores with a linear bias, band and document masks, the sigmoid sum.

FlexAttention is a softmax: it returns Σ e^s v / Σ e^s and log Σ e^s. With s = log σ(x) their product is Σ σ(x) v, the
sum SWAT asks for, exactly and without an offset. On CUDA `sigmoid_sum` multiplies the two. Compiled FlexAttention
returns no logsumexp on a CPU: there one more key, of score 0 = log 1, makes the output Σ σ v / (1 + Σ σ), and a value
column that is 1 for that key alone makes it 1 / (1 + Σ σ); `sum_beside_extra_key` divides.

The modifiers compose with others through `torch.nn.attention.flex_attention.and_masks`:

>>> from torch.nn.attention.flex_attention import AuxRequest, and_masks, create_block_mask, flex_attention
>>> q, k, v = torch.randn(3, 1, 2, 256, 16).unbind()
>>> even_keys = lambda b, h, q_idx, kv_idx: kv_idx % 2 == 0
>>> block_mask = create_block_mask(and_masks(band_mask(63, 0), even_keys), None, None, 256, 256, device="cpu")
>>> score_mod = log_sigmoid_score(slopes=torch.tensor([-0.5, 0.5]))
>>> out, aux = flex_attention(q, k, v, score_mod, block_mask, return_aux=AuxRequest(lse=True))
>>> sigmoid_sum(out, aux.lse).shape
torch.Size([1, 2, 256, 16])
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def log_sigmoid(x: Tensor) -> Tensor:
    """log σ(x): on an NVIDIA GPU in two special-function instructions, with a derivative of its own; float32 there."""
    if x.device.type == "cuda" and torch.version.hip is None:
        _teach_inductor()
        return cast(Tensor, _FastLogSigmoid.apply(x.to(torch.float32)))  # type: ignore[no-untyped-call]  # torch's
    return F.logsigmoid(x)


def biased_score(slopes: Tensor | None = None, logit_bias: Tensor | None = None, offset: int | Tensor = 0) -> ScoreMod:
    """score + slopes[h]·|i − j| + logit_bias[h], for a softmax.

    Args:
        slopes: `[Hq]` or, one per query, `[Hq, Lq]`; logits per token of distance, negative favours recent keys.
            FlexAttention adds up its gradient atomically: with `[Hq]` all pairs of a head meet in one number.
        logit_bias: `[Hq]` or `[Hq, Lq]`, logits.
        offset: position of the first query, Lk − Lq tokens where the last query and the last key share a position; a
            tensor of no dimension may change without a new compilation.
    """

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if slopes is not None:  # distances in floating point: half the instructions, and exact up to 2^24 tokens
            distance = ((q_idx + offset).to(slopes.dtype) - kv_idx.to(slopes.dtype)).abs()
            score = score + _of_head(slopes, h, q_idx) * distance
        if logit_bias is not None:
            score = score + _of_head(logit_bias, h, q_idx)
        return score

    return score_mod


def _of_head(x: Tensor, h: Tensor, q_idx: Tensor) -> Tensor:
    return x[h] if x.dim() == 1 else x[h, q_idx]


def log_sigmoid_score(
    slopes: Tensor | None = None, logit_bias: Tensor | None = None, offset: int | Tensor = 0
) -> ScoreMod:
    """log σ(score + slopes[h]·|i − j| + logit_bias[h]); arguments are those of `biased_score`."""
    biased = biased_score(slopes, logit_bias, offset)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return log_sigmoid(biased(score, b, h, q_idx, kv_idx))

    return score_mod


def band_mask(left: int | Tensor | None, right: int | Tensor | None, offset: int | Tensor = 0) -> MaskMod:
    """Keys with −right ≤ i − j ≤ left, in tokens; None leaves a side unbounded. `offset` as in `biased_score`."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = q_idx + offset - kv_idx
        visible = distance == distance
        if left is not None:
            visible = visible & (distance <= left)
        if right is not None:
            visible = visible & (distance >= -right)
        return visible

    return mask_mod


def document_mask(document_ids: Tensor, offset: int | Tensor = 0) -> MaskMod:
    """Keys of the query's own document, ids int `[B, Lk]`. A negative id sees nothing and is seen by nothing.

    Queries and keys beyond Lk, where tensors are padded, take the last id. `offset` as in `biased_score`.
    """

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        last = document_ids.shape[1] - 1  # in here: torch 2.11 takes a symbol from outside, but no sum with it
        document = document_ids[b, (q_idx + offset).clamp(max=last)]
        return (document == document_ids[b, kv_idx.clamp(max=last)]) & (document >= 0)

    return mask_mod


def sigmoid_sum(out: Tensor, lse: Tensor) -> Tensor:
    """Σ σ(x) v from FlexAttention's output `[B, Hq, Lq, Dv]` and logsumexp `[B, Hq, Lq]` of log-sigmoid scores."""
    return (out.to(lse.dtype) * lse.exp().unsqueeze(-1)).to(out.dtype)


def with_extra_key(k: Tensor, v: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """k and v padded with zeros to `length` keys (default: one more), v by one column too: 1 at the last key alone."""
    more = 1 if length is None else length - k.shape[2]
    k, v = F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 1, 0, more))
    v[:, :, -1, -1] = 1
    return k, v


def beside_extra_key(score_mod: ScoreMod, mask_mod: MaskMod, position: int) -> tuple[ScoreMod, MaskMod]:
    """The two modifiers with the extra key at `position`: its score is 0 and every query sees it."""

    def score(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(kv_idx == position, 0.0, score_mod(score, b, h, q_idx, kv_idx))

    def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx == position) | mask_mod(b, h, q_idx, kv_idx)

    return score, mask


def sum_beside_extra_key(out: Tensor) -> Tensor:
    """Σ σ(x) v from FlexAttention's output over keys and values of `with_extra_key`: its last column divides."""
    return out[..., :-1] / out[..., -1:]


# log σ(x) = −ln 2 · log2(1 + 2^(−x·log2 e)) and σ(−x) = 1 / (1 + 2^(x·log2 e)) in PTX: F.logsigmoid costs three times
# the instructions (its log1p is a polynomial), exp2 and log2 twice as many; an exact division branches. Each on one
# line, without quotes, since Inductor pastes it as it is.
_PTX = {
    "log_sigmoid": "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
    "lg2.approx.ftz.f32 t, t; mul.f32 $0, t, 0fBF317218; }",
    "sigmoid_of_negative": "{ .reg .f32 t; mul.f32 t, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 t, t; "
    "add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
}


def _teach_inductor() -> bool:
    """Lower the two operators below to `_PTX`. With the mark below the only private API here; tests/flex watches both.

    torch 2.13 has a public operator for inline assembly, torch 2.11 has none.
    """
    from torch._inductor import lowering
    from torch._inductor.virtualized import ops

    for name, asm in _PTX.items():
        operator = getattr(torch.ops.swat_flex, _operator_name(name)).default
        if operator not in lowering.lowerings:
            lower = functools.partial(ops.inline_asm_elementwise, asm=asm, constraints="=f,f", dtype=torch.float32)
            lowering.register_lowering(operator, type_promotion_kind=None)(lowering.make_pointwise(lower))
    return True


# A trace runs it and does not trace it: torch.compiler.assume_constant_result, without importing the compiler for it.
_teach_inductor._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _operator_name(name: str) -> str:
    """Name an operator after its assembly too: Inductor's cache of compiled programs knows the name alone."""
    return f"{name}_{hashlib.sha256(_PTX[name].encode()).hexdigest()[:8]}"


@torch.library.custom_op(f"swat_flex::{_operator_name('log_sigmoid')}", mutates_args=())
def _log_sigmoid(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(F.logsigmoid(x))  # which on a CPU is contiguous whatever x is; the fake is not


@torch.library.custom_op(f"swat_flex::{_operator_name('sigmoid_of_negative')}", mutates_args=())
def _sigmoid_of_negative(x: Tensor) -> Tensor:
    return torch.sigmoid(-x)


@_log_sigmoid.register_fake
@_sigmoid_of_negative.register_fake
def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _FastLogSigmoid(torch.autograd.Function):
    """The operator of log σ(x) with its derivative σ(−x), in the form that FlexAttention can trace and vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return cast(Tensor, _log_sigmoid(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * cast(Tensor, _sigmoid_of_negative(x))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return log_sigmoid(x), in_dims[0]
