"""What every backend's operator has in common: schema, fake kernels, autograd, FLOPs, layout of what it returns.

torch.library knows tensors, numbers and strings alone: here, and nowhere else, `Operands` are flattened and rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from swat_flex.operands import Operands
from swat_flex.positions import per_head_dtype
from swat_flex.window import Window

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
Swat = Callable[[Operands], Tensor]

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? slopes, Tensor? logit_bias, Tensor? document_ids"
_NUMBERS = "SymInt? left, SymInt? right, float scale, str activation"


def define(name: str, forward: Swat, backward: Callable[[Tensor, Operands, bool], Gradients] | None = None) -> Swat:
    """Register `swat_flex::name` and, with a backward, `swat_flex::name_backward` with torch.library.

    Args:
        name: the backend's.
        forward: operands to the output `[B, Hq, Lq, Dv]`. No operand is empty.
        backward: `(grad, operands, per_head)` to (dq, dk, dv, `[2, Hq]` of dslopes and dlogit_bias); what the last
            holds does not matter unless `per_head`. No operand is empty. None: the operator has no gradient.

    Returns:
        The operator, called with operands; an empty q gives an empty output. It saves its tensor inputs for the
        backward and nothing else; a second derivative raises.
    """

    def run_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        return empty_output(q, v.shape[3]) if q.numel() == 0 else forward(_operands(q, k, v, *rest))

    schema = f"({_TENSORS}, {_NUMBERS}) -> Tensor"
    op = torch.library.custom_op(f"swat_flex::{name}", run_forward, mutates_args=(), schema=schema)
    op.register_fake(lambda q, k, v, *_: empty_output(q, v.shape[3]))
    register_flop_formula(getattr(torch.ops.swat_flex, name))(_forward_flops)
    if backward is not None:
        _register_autograd(op, _define_backward(name, backward))

    def swat(operands: Operands) -> Tensor:
        x = operands
        out: Tensor = op(
            x.q, x.k, x.v, x.slopes, x.logit_bias, x.document_ids, x.window.left, x.window.right, x.scale, x.activation
        )
        return out

    return swat


def _define_backward(name: str, backward: Callable[[Tensor, Operands, bool], Gradients]) -> Any:
    def run_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Gradients:
        *options, per_head = rest
        if q.numel() == 0:
            return gradients_like(q, k, v, torch.zeros)
        return backward(grad, _operands(q, k, v, *options), per_head)

    schema = f"(Tensor grad, {_TENSORS}, {_NUMBERS}, bool per_head) -> (Tensor, Tensor, Tensor, Tensor)"
    op = torch.library.custom_op(f"swat_flex::{name}_backward", run_backward, mutates_args=(), schema=schema)
    op.register_fake(lambda grad, q, k, v, *_: gradients_like(q, k, v))
    register_flop_formula(getattr(torch.ops.swat_flex, f"{name}_backward"))(_backward_flops)
    return op


def _operands(*arguments: Any) -> Operands:
    fields = (*arguments[:6], Window(*arguments[6:8]), *arguments[8:])
    return Operands(*fields)


def define_decode(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register `swat_flex::name_decode`: the newest queries against a ring of keys; it has no gradient.

    Args:
        name: the backend's.
        run: `(q, keys, values, length, slopes, logit_bias, window, scale)` to the output `[B, Hq, T, Dv]`, as
            `empty_output` makes it. keys and values are `[B, Hkv, slots, ·]`, position p in slot p % slots, slots ≥
            window + T − 1; length is `[B]` int64: row t of q is position length − T + t. No input is empty.

    Returns:
        The operator, called as `run` is, on validated arguments; an empty q gives an empty output.
    """

    def decode(q: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
        return empty_output(q, values.shape[3]) if q.numel() == 0 else run(q, keys, values, *rest)

    schema = (
        "(Tensor q, Tensor keys, Tensor values, Tensor length, Tensor? slopes, Tensor? logit_bias, SymInt window, "
        "float scale) -> Tensor"
    )
    op = torch.library.custom_op(f"swat_flex::{name}_decode", decode, mutates_args=(), schema=schema)
    op.register_fake(lambda q, keys, values, *_: empty_output(q, values.shape[3]))
    register_flop_formula(getattr(torch.ops.swat_flex, f"{name}_decode"))(_decode_flops)
    return op


def empty_output(q: Tensor, value_dim: int) -> Tensor:
    """Allocate `[B, Hq, Lq, Dv]` whose axes lie in memory in q's order."""
    order = sorted(range(4), key=q.stride, reverse=True)
    return torch.empty_permuted((*q.shape[:3], value_dim), order, dtype=q.dtype, device=q.device)


def gradients_like(q: Tensor, k: Tensor, v: Tensor, make: Callable[..., Tensor] = torch.empty) -> Gradients:
    """Allocate dq, dk, dv and `[2, Hq]` of dslopes and dlogit_bias, all contiguous, by torch.empty or torch.zeros."""
    dq, dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, make((2, q.shape[1]), dtype=per_head_dtype(q), device=q.device)


def _register_autograd(op: Any, backward_op: Any) -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.rest = inputs[6:]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        per_head = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        dq, dk, dv, d_per_head = backward_op(grad, *ctx.saved_tensors, *ctx.rest, per_head)
        gradients = (dq, dk, dv, *d_per_head.unbind())
        needed = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:5], strict=True))
        return *needed, *[None] * 5

    op.register_autograd(differentiate, setup_context=save)


def _forward_flops(q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    """Count the visible pairs' FLOPs, documents apart; the arguments are shapes where the operator has tensors."""
    left, right = rest[3:5]
    return int(2 * q[0] * q[1] * Window(left, right).pairs(q[2], k[2]) * (q[3] + v[3]))


def _backward_flops(grad: Any, *inputs: Any, **_: Any) -> int:
    return 5 * _forward_flops(*inputs) // 2


def _decode_flops(q: Any, keys: Any, values: Any, *rest: Any, **_: Any) -> int:
    """Count full windows' FLOPs: how many tokens a ring holds is known on its device alone."""
    return int(2 * q[0] * q[1] * q[2] * rest[3] * (q[3] + values[3]))
