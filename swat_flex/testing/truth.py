"""`truth_of`: the exact results of a call, and how far rounding alone may move each element from them.

Exact means float64 for float32 and lower, and twice the digits of float64 (`Twofold`) for float64.

Each rounding is followed through the definition and absolute values are added up. So nothing cancels, any order of
summation is covered, and what is allowed is a theorem, not a measurement. With ε half a unit of the dtype that is
computed in, u of the dtype that is returned, p of the dtype that weights and ∂x are rounded to before a product (0
where they are not), η the smallest normal number, n the terms of a sum, w' = w(1 − w), dw = ⟨g, v⟩, dx = dw·w':

    δx   = ε·((D + 6)·|scale|·Σ|q||k| + 8·(|slope|·(|i − j| + reach) + |bias|))     D + 8 if bias first
    δw   = w'·(e^δx − 1) + ε·(exp + 3)·w + η                            δ of w: p·w more
    δdw  = ε·(Dv + 2)·Σ|g||v|
    δdx  = w'·δdw + (|dw| + δdw)·(w'·(e^δx − 1) + ε·(exp + 4)·w + η) + 4ε·|dx| + η·(Dv·w' + 3)
    δout = Σ (δw + p·w + ε(n + 3)·w)·|v| + η·(n + 2),     δdv likewise with |g|
    δdq  = |scale|·(Σ (δdx + p·|dx| + ε(n + 3)·|dx|)·|k| + η·(n + 2)),     δdk likewise with |q|

and then u·|result| and the smallest number of the returned dtype. `Arithmetic` has what differs between backends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swat_flex import reference
from swat_flex.operands import Operands
from swat_flex.testing.hardware import ULPS
from swat_flex.testing.twofold import Twofold

# How far a backend's e^x may be from the exact one, in units of the last place: the libraries on a CPU promise 1;
# a GPU's ex2.approx is documented with 2, and the division after it rounds as much again.
EXP_ULPS = {"cpu": 1.0, "cuda": 2 * ULPS}
SECOND_ORDER = 1 + 2.0**-5  # products of two errors, and the rounding of the bound itself


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a backend may round beside sums and products.

    exp: relative error of σ's exponential, in halves of a unit of the last place.
    operands: whether weights and ∂x are rounded to the inputs' dtype before they are multiplied.
    reach: tokens beyond |i − j| over which slope · distance may be split in two.
    logsumexp: whether weights are e^(log σ(x)), so that log σ(x) is rounded too.
    floor: σ below which a backend gives up relative accuracy.
    bias_first: whether the products of a logit are added to slope · distance + bias, which then is rounded D times.
    """

    exp: float = 2.0
    operands: bool = False
    reach: int = 0
    logsumexp: bool = False
    floor: float = 0.0
    bias_first: bool = False

    @classmethod
    def of(cls, backend: str, device: str, dtype: torch.dtype) -> Arithmetic:
        kind = "cpu" if device == "cpu" else "cuda"
        exp, low = 2 * EXP_ULPS[kind], dtype in (torch.float16, torch.bfloat16)
        if backend == "triton":  # its base is 2, its tiles have up to 128 × 128; float32 has no floor
            return cls(exp + 2, operands=low, reach=384, floor=2.0**-29 if low else 0.0)
        if backend == "flex":
            return cls(exp, operands=low and kind != "cpu", logsumexp=True)
        return cls(exp, bias_first=backend == "banded")


@dataclass(slots=True)
class Truth:
    """Exact results by name, float64.

    rest: what float64 leaves of them; empty where that is nothing.
    allowed: how far rounding may move each element.
    trend: what all elements of "out" may gain or lose together; infinite in rows that may be off alike by chance, where
        a weight beyond ½ may be 1 in all of them, and None where a coarse dtype may round them to one number.
    """

    exact: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    allowed: dict[str, Tensor] = field(default_factory=dict)
    trend: Tensor | None = None

    def error(self, name: str, actual: Tensor) -> Tensor:
        """actual − exact, infinite where actual is no number."""
        error = actual.double() - self.exact[name]
        if name in self.rest:
            error = error - self.rest[name]
        return error.nan_to_num(nan=float("inf"))


def truth_of(operands: Operands, grad: Tensor | None, arithmetic: Arithmetic, per_head: tuple[str, ...] = ()) -> Truth:
    """Compute the truth of a call: "out", with `grad` also "dq", "dk", "dv" and of `per_head` "dslopes", "dlogit_bias".

    Args:
        operands: the call, in the dtype it is made in.
        grad: the output's gradient, `[B, Hq, Lq, Dv]`, or None.
    """
    call = _Call(operands, grad)
    twofold = operands.q.dtype == torch.float64
    parts = _Twofold(call) if twofold else _Float64(call)
    truth = Truth()
    names = ("out", "dq", "dk", "dv", *per_head) if grad is not None else ("out",)
    for name in names:
        value = parts.result(name)
        if isinstance(value, Twofold):
            truth.rest[name], value = call.unfolded(name, value.low), value.high
        truth.exact[name] = call.unfolded(name, value)
    _bound(call, parts, arithmetic, truth, names)
    return truth


class _Call:
    """A call's tensors in float64 with the heads that share a key head below one another: `[B·Hkv, group·Lq, ·]`."""

    def __init__(self, operands: Operands, grad: Tensor | None) -> None:
        q, k = operands.q, operands.k
        self.dtype, self.scale = q.dtype, operands.scale
        self.softmax = operands.activation == "softmax"
        self.batch, self.q_heads, self.q_len, self.head_dim = q.shape
        self.kv_heads, self.kv_len = k.shape[1:3]
        self.value_dim, self.group = operands.v.shape[3], self.q_heads // self.kv_heads
        self.q, self.g = self._of_queries(q), None if grad is None else self._of_queries(grad)
        self.k, self.v = (x.double().reshape(-1, self.kv_len, x.shape[3]) for x in (k, operands.v))
        self.distance = reference.distance(q, k).abs().double()
        self.seen = reference.visible(operands)[:, :, None].double()  # [B, 1, 1, Lq, Lk]
        self.slopes, self.bias = (
            None if x is None else x.double().view(self.kv_heads, self.group, 1, 1)
            for x in (operands.slopes, operands.logit_bias)
        )

    def _of_queries(self, x: Tensor) -> Tensor:
        return x.double().reshape(self.batch * self.kv_heads, self.group * self.q_len, x.shape[3])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a tile of all pairs: `[B, Hkv, group, Lq, Lk]`."""
        return self.batch, self.kv_heads, self.group, self.q_len, self.kv_len

    @property
    def flat(self) -> tuple[int, int, int]:
        """The same as a batch of matrices."""
        return self.batch * self.kv_heads, self.group * self.q_len, self.kv_len

    def unfolded(self, name: str, x: Tensor) -> Tensor:
        """A result in the shape in which a backend returns it."""
        if name in ("dslopes", "dlogit_bias"):
            return x.reshape(self.q_heads)
        heads, length = (self.kv_heads, self.kv_len) if name in ("dk", "dv") else (self.q_heads, self.q_len)
        return x.view(self.batch, heads, length, -1)


class _Float64:
    """Logits, weights and their derivatives in float64; `_Twofold` has the same names."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        x = (call.q @ call.k.mT).view(call.shape) * call.scale
        if call.slopes is not None:
            x += call.slopes * call.distance
        if call.bias is not None:
            x += call.bias
        self.x = x
        if call.softmax:
            below = torch.where(call.seen > 0, x, float("-inf"))
            below = below - below.amax(-1, keepdim=True).clamp(min=-1e300)
            e = below.exp()
            self.w = e / e.sum(-1, keepdim=True).clamp(min=1e-300)
            self.left = below
        else:
            self.w, self.left = x.sigmoid() * call.seen, (-x).sigmoid() * call.seen
        if call.g is not None:
            self.dw = (call.g @ call.v.mT).view(call.shape)
            if call.softmax:
                self.mean = (self.w * self.dw).sum(-1, keepdim=True)
                self.dx = self.w * (self.dw - self.mean)
            else:
                self.dx = self.dw * self.w * self.left

    def result(self, name: str) -> Tensor:
        call = self.call
        if name == "out":
            return self.w.view(call.flat) @ call.v
        if name == "dv":
            return self.w.view(call.flat).mT @ _known(call.g)
        if name == "dq":
            return self.dx.view(call.flat) @ call.k * call.scale
        if name == "dk":
            return self.dx.view(call.flat).mT @ call.q * call.scale
        return (self.dx * call.distance if name == "dslopes" else self.dx).sum((0, 3, 4))


class _Twofold:
    """The same in `Twofold`; v and the gradient are scaled to the neighbourhood of 1. `w`, `left`, `dw`, … round it."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.v_exponent = _exponent(call.v)
        v = Twofold(call.v * 2.0**-self.v_exponent)
        self.q, self.k, self.v = Twofold(call.q), Twofold(call.k), v
        x = (self.q @ self.k.mT).view(*call.shape) * call.scale
        if call.slopes is not None:
            x = x + Twofold(call.slopes) * call.distance
        if call.bias is not None:
            x = x + call.bias
        self.x = x.high
        hidden = call.seen == 0
        if call.softmax:
            most = torch.where(hidden, float("-inf"), x.high).amax(-1, keepdim=True).clamp(min=-1e300)
            below = (x - most.expand_as(x.high)).masked(call.seen)
            e = below.exp().masked(call.seen)
            total = e.sum_last()
            total.high.masked_fill_(total.high == 0, 1.0)
            weights = e * total.reciprocal()
            self.left = torch.where(hidden, float("-inf"), below.high)
        else:
            pair = x.sigmoids()
            weights, left = (y.masked(call.seen) for y in pair)
            self.left = left.high
        self.weights, self.w = weights, weights.high
        if call.g is not None:
            self.g_exponent = _exponent(call.g)
            self.g = Twofold(call.g * 2.0**-self.g_exponent)
            dw = (self.g @ v.mT).view(*call.shape)
            if call.softmax:
                mean = (weights * dw).sum_last()
                centred = dw - Twofold(mean.high.expand_as(dw.high), mean.low.expand_as(dw.high))
                self.derivatives = weights * centred
            else:
                self.derivatives = dw * weights * left
            both = self.v_exponent + self.g_exponent
            self.dw, self.dx = dw.scaled(both).high, self.derivatives.scaled(both).high
            if call.softmax:
                self.mean = mean.scaled(both).high

    def result(self, name: str) -> Twofold:
        call = self.call
        if name == "out":
            return (self.weights.view(*call.flat) @ self.v).scaled(self.v_exponent)
        if name == "dv":
            return (self.weights.view(*call.flat).mT @ self.g).scaled(self.g_exponent)
        both = self.v_exponent + self.g_exponent
        if name in ("dq", "dk"):
            derivatives = self.derivatives.view(*call.flat)
            x = derivatives @ self.k if name == "dq" else derivatives.mT @ self.q
            return (x * call.scale).scaled(both)
        terms = self.derivatives * call.distance if name == "dslopes" else self.derivatives
        high, low = (y.permute(1, 2, 0, 3, 4).reshape(1, call.q_heads, -1) for y in (terms.high, terms.low))
        return Twofold(high, low).sum_last().scaled(both)


def _exponent(x: Tensor) -> int:
    """The exponent of the largest number, within what float64 can divide by."""
    return max(-1000, int(torch.frexp(x.abs().max()).exponent)) if x.numel() else 0


def _known(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


class _Errors:
    """How far rounding may move weights and ∂x of each pair: the derivation is at the top of the file."""

    def __init__(self, call: _Call, parts: Any, arithmetic: Arithmetic) -> None:
        self.call, self.parts, self.arithmetic = call, parts, arithmetic
        self.epsilon, self.unit, self.normal, self.least = _precision(call.dtype)
        self.rounded = self.unit if arithmetic.operands else 0.0
        self.of_queries, self.of_keys = call.seen.sum(-1, keepdim=True), call.seen.sum(-2, keepdim=True) * call.group
        self.more = (self.of_queries + 1) if arithmetic.logsumexp else 1.0  # Σ w, which a logsumexp divides by
        self.size = (call.q.abs() @ call.k.abs().mT).view(call.shape) * abs(call.scale)
        self.fixed = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        if call.slopes is not None:
            self.fixed = call.slopes.abs() * (call.distance + arithmetic.reach)
        if call.bias is not None:
            self.fixed = self.fixed + call.bias.abs()

    def of_weights(self) -> tuple[Tensor, Tensor]:
        """(δw, the part of it that ∂w/∂x shares)."""
        call, epsilon, exp, w = self.call, self.epsilon, self.arithmetic.exp, self.parts.w
        e_x = (call.head_dim + 6) * epsilon * self.size
        e_x = e_x + (8 + call.head_dim * self.arithmetic.bias_first) * epsilon * self.fixed
        if self.arithmetic.logsumexp:
            e_x += 4 * epsilon * (self.parts.x.abs() + 1)
        underflow = call.seen * (self.arithmetic.floor + 2 * self.normal * self.more)
        if not call.softmax:
            e_slope: Tensor = w * self.parts.left * torch.expm1(e_x) + underflow
            return e_slope + epsilon * (exp + 3) * w, e_slope
        far = -self.parts.left.clamp(min=-1e4)  # below the row's largest logit
        own = torch.expm1(e_x + 2 * epsilon * far) + epsilon * (exp + 2)
        shared = (w * own).sum(-1, keepdim=True) + epsilon * (self.of_queries + 2)
        ratio = own + (1 + own) * torch.where(shared < 0.5, shared / (1 - shared), 1e30)
        e_w = w * (ratio + 2 * epsilon) + underflow
        return e_w, e_w

    def of_logits(self, e_w: Tensor, e_slope: Tensor) -> Tensor:
        """δ∂x."""
        call, parts, epsilon = self.call, self.parts, self.epsilon
        w, dw, dx = parts.w, parts.dw.abs(), parts.dx.abs()
        e_dw = (_known(call.g).abs() @ call.v.abs().mT).view(call.shape) * (epsilon * (call.value_dim + 2))
        slope = w if call.softmax else w * parts.left
        lost = (2 * self.normal) * call.seen * (call.value_dim * slope + 3)
        if not call.softmax:
            e_weights = e_slope + epsilon * (self.arithmetic.exp + 4) * w
            e_product: Tensor = slope * e_dw + (dw + e_dw) * e_weights + 4 * epsilon * dx + lost
            return e_product
        terms = e_w * (dw + e_dw) + w * e_dw + epsilon * (self.of_queries + 3) * w * dw
        e_mean = terms.sum(-1, keepdim=True) + self.normal * self.of_queries
        e_centred = e_dw + e_mean + epsilon * 2 * (dw + parts.mean.abs())
        e_dx: Tensor = w * e_centred + e_w * ((parts.dw - parts.mean).abs() + e_centred) + 2 * epsilon * dx + lost
        return e_dx * call.seen

    def of_operands(self) -> Tensor:
        """What rounding ∂x to the inputs' dtype loses before a product."""
        call = self.call
        rounded: Tensor = self.rounded * self.parts.dx.abs()
        if not self.arithmetic.operands or call.dtype != torch.float16 or not call.seen.numel():
            return rounded
        # In float16 ∂x lies scaled: what is a small share of its largest possible value underflows.
        longest = [float(x.norm(dim=-1).max()) for x in (_known(call.g), call.v)]
        return rounded + max(longest[0] * longest[1] * 2.0**-40, 2.0**-84) * call.seen


def _bound(call: _Call, parts: Any, arithmetic: Arithmetic, truth: Truth, names: tuple[str, ...]) -> None:
    """Fill in `allowed` and `trend`."""
    errors = _Errors(call, parts, arithmetic)
    epsilon, unit, normal = errors.epsilon, errors.unit, errors.normal

    def allow(name: str, of_pairs: Tensor, others: Tensor, factor: float = 1.0) -> None:
        """The sum that makes a result, of bounds; and the products that are too small for a normal number."""
        of_queries = name in ("out", "dq")
        terms, flat = (errors.of_queries if of_queries else errors.of_keys), of_pairs.reshape(call.flat)
        more = (terms + 1) if arithmetic.logsumexp else 1
        lost = normal * (2 * terms + 4) * more * max(factor, 1.0)
        total = call.unfolded(name, (flat if of_queries else flat.mT) @ others.abs()) * (factor * SECOND_ORDER)
        rounding = unit * truth.exact[name].abs() + errors.least
        truth.allowed[name] = total + lost.reshape(call.batch, 1, -1, 1) + rounding

    w, (e_w, e_slope) = parts.w, errors.of_weights()
    allow("out", e_w + (errors.rounded + epsilon * (errors.of_queries + 3)) * w, call.v)
    if unit == epsilon and w.numel():
        drift = call.unfolded("out", _drift(errors).reshape(*call.flat[:2], 1))
        lost = call.v.abs().sum(1).view(call.batch, call.kv_heads, 1, -1).repeat_interleave(call.group, 1)
        lost = lost * (2 * normal + arithmetic.floor) + 2 * normal * (call.kv_len + 2)
        truth.trend = drift * (truth.exact["out"].abs() + errors.normal) + lost * (
            (call.kv_len + 1) if arithmetic.logsumexp else 1
        )
    if call.g is None:
        return
    allow("dv", e_w + (errors.rounded + epsilon * (errors.of_keys + 3)) * w, call.g)
    e_dx, dx, scale = errors.of_logits(e_w, e_slope), parts.dx.abs(), abs(call.scale)
    operand = errors.of_operands() + e_dx
    allow("dq", operand + epsilon * (errors.of_queries + 3) * dx, call.k, scale)
    allow("dk", operand + epsilon * (errors.of_keys + 3) * dx, call.q, scale)
    # A tile, then the tiles of a row, then the rows: no longer chains than that.
    terms = epsilon * (float(errors.of_queries.max()) + call.batch * call.q_len + 8) if call.seen.numel() else 0.0
    for name in names[4:]:
        each = (e_dx + terms * dx) * (call.distance if name == "dslopes" else 1.0)
        total = each.sum((0, 3, 4)).reshape(-1) * SECOND_ORDER
        truth.allowed[name] = total + epsilon * truth.exact[name].abs() + 4 * normal * (1 + call.seen.sum())


def _drift(errors: _Errors) -> Tensor:
    """By what share of itself a row may be off in the same direction as all others, `[B, Hkv, group, Lq, 1]`.

    What is rounded once for many rows: the exponential, by its own systematic error; scale and log2 e, as constants;
    slope · distance + bias, which is the same in each row. In the mean over a row's weights.
    """
    call, parts, arithmetic = errors.call, errors.parts, errors.arithmetic
    constants = 2 * errors.size + parts.x.abs() * (2 if arithmetic.reach or arithmetic.logsumexp else 0)
    if call.slopes is not None:
        constants = constants + 4 * errors.fixed
    if not call.softmax:
        constants = constants * parts.left
    total = parts.w.sum(-1, keepdim=True)
    mean = (parts.w * constants).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
    drift: Tensor = errors.epsilon * (2 if call.softmax else 1) * (arithmetic.exp + 1 + mean)
    return drift.masked_fill(parts.w.amax(-1, keepdim=True) > 0.5, float("inf"))


def _precision(dtype: torch.dtype) -> tuple[float, float, float, float]:
    """(ε that is computed in, u of the dtype, smallest normal number computed with, smallest number of the dtype)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given, computed = torch.finfo(dtype), torch.finfo(wide)
    least = given.smallest_normal * (given.eps if dtype == torch.float16 else 1)
    return computed.eps / 2, given.eps / 2, computed.smallest_normal, least
