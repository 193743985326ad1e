"""`truth_of`: the exact results of a call, and how far rounding alone may move each element from them.

Exact means float64 for float32 and lower, and twice the digits of float64 (`Twofold`) for float64.

Each rounding is followed through the definition and absolute values are added up. So nothing cancels, any order of
summation is covered, and what is allowed is a theorem, not a measurement. With ε half a unit of the dtype that is
computed in, u of the dtype that is returned, p of the dtype that weights and ∂x are rounded to before a product (0
where they are not), η the smallest normal number, n the terms of a sum, w' = w(1 − w), dw = ⟨g, v⟩, dx = dw·w':

    δx   = ε·((D + 6)·|scale|·Σ|q||k| + 8·(|slope|·(|i − j| + reach) + |bias|))
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
    """

    exp: float = 2.0
    operands: bool = False
    reach: int = 0
    logsumexp: bool = False
    floor: float = 0.0

    @classmethod
    def of(cls, backend: str, device: str, dtype: torch.dtype) -> Arithmetic:
        kind = "cpu" if device == "cpu" else "cuda"
        exp, low = 2 * EXP_ULPS[kind], dtype in (torch.float16, torch.bfloat16)
        if backend == "triton":  # its base is 2, its tiles have up to 128 × 128; float32 has no floor
            return cls(exp + 2, operands=low, reach=384, floor=2.0**-29 if low else 0.0)
        if backend == "flex":
            return cls(exp, operands=low and kind != "cpu", logsumexp=True)
        return cls(exp)


@dataclass(slots=True)
class Truth:
    """Exact results by name, float64.

    rest: what float64 leaves of them; empty where that is nothing.
    allowed: how far rounding may move each element.
    trend: what all elements of "out" may gain or lose together; None where rows may be off alike by chance: where a
        weight beyond ½ may be 1 in all of them, and where the dtype is so coarse that they round to one number.
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
        value, rest = parts.result(name)
        truth.exact[name] = call.unfolded(name, value)
        if rest is not None:
            truth.rest[name] = call.unfolded(name, rest)
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

    def result(self, name: str) -> tuple[Tensor, Tensor | None]:
        call = self.call
        if name == "out":
            return self.w.view(call.flat) @ call.v, None
        if name == "dv":
            return self.w.view(call.flat).mT @ _known(call.g), None
        if name == "dq":
            return self.dx.view(call.flat) @ call.k * call.scale, None
        if name == "dk":
            return self.dx.view(call.flat).mT @ call.q * call.scale, None
        return (self.dx * call.distance if name == "dslopes" else self.dx).sum((0, 3, 4)), None


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

    def result(self, name: str) -> tuple[Tensor, Tensor | None]:
        call = self.call
        if name == "out":
            x = (self.weights.view(*call.flat) @ self.v).scaled(self.v_exponent)
            return x.high, x.low
        if name == "dv":
            x = (self.weights.view(*call.flat).mT @ self.g).scaled(self.g_exponent)
            return x.high, x.low
        both = self.v_exponent + self.g_exponent
        if name in ("dq", "dk"):
            derivatives = self.derivatives.view(*call.flat)
            x = derivatives @ self.k if name == "dq" else derivatives.mT @ self.q
            x = (x * call.scale).scaled(both)
            return x.high, x.low
        terms = self.derivatives * call.distance if name == "dslopes" else self.derivatives
        high, low = (y.permute(1, 2, 0, 3, 4).reshape(1, call.q_heads, -1) for y in (terms.high, terms.low))
        x = Twofold(high, low).sum_last().scaled(both)
        return x.high, x.low


def _exponent(x: Tensor) -> int:
    """The exponent of the largest number."""
    return int(torch.frexp(x.abs().max()).exponent) if x.numel() else 0


def _known(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _bound(call: _Call, parts: Any, arithmetic: Arithmetic, truth: Truth, names: tuple[str, ...]) -> None:
    """Fill in `allowed` and `trend`: the derivation is at the top of the file."""
    epsilon, unit, normal, least = _precision(call.dtype)
    rounded = unit if arithmetic.operands else 0.0
    q, k, v = call.q.abs(), call.k.abs(), call.v.abs()
    of_keys, of_queries = call.seen.sum(-2, keepdim=True) * call.group, call.seen.sum(-1, keepdim=True)
    size = (q @ k.mT).view(call.shape) * abs(call.scale)
    fixed = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if call.slopes is not None:
        fixed = call.slopes.abs() * (call.distance + arithmetic.reach)
    if call.bias is not None:
        fixed = fixed + call.bias.abs()
    e_x = (call.head_dim + 6) * epsilon * size + 8 * epsilon * fixed
    if arithmetic.logsumexp:
        e_x += 4 * epsilon * (parts.x.abs() + 1)
    w = parts.w
    underflow = call.seen * (arithmetic.floor + 2 * normal * ((of_queries + 1) if arithmetic.logsumexp else 1))
    if call.softmax:
        far = -parts.left.clamp(min=-1e4)  # below the row's largest logit
        own = torch.expm1(e_x + 2 * epsilon * far) + epsilon * (arithmetic.exp + 2)
        shared = (w * own).sum(-1, keepdim=True) + epsilon * (of_queries + 2)
        ratio = own + (1 + own) * torch.where(shared < 0.5, shared / (1 - shared), 1e30)
        e_w = w * (ratio + 2 * epsilon) + underflow
    else:
        slope = w * parts.left
        e_slope = slope * torch.expm1(e_x) + underflow
        e_w = e_slope + epsilon * (arithmetic.exp + 3) * w

    def summed(name: str, errors: Tensor, others: Tensor, factor: float = 1.0) -> Tensor:
        """The sum that makes a result, of bounds; with the products that are too small for a normal number."""
        terms, flat = (of_queries if name in ("out", "dq") else of_keys), errors.reshape(call.flat)
        lost = normal * (2 * terms + 4) * ((terms + 1) if arithmetic.logsumexp else 1) * max(factor, 1.0)
        total = (flat.mT if name in ("dk", "dv") else flat) @ others
        return call.unfolded(name, total * factor) + lost.reshape(call.batch, 1, -1, 1) + least

    def allow(name: str, errors: Tensor, others: Tensor, factor: float = 1.0) -> None:
        bound = summed(name, errors, others, factor * SECOND_ORDER)
        truth.allowed[name] = bound + unit * truth.exact[name].abs()

    allow("out", e_w + (rounded + epsilon * (of_queries + 3)) * w, v)
    if unit == epsilon and float(w.amax() if w.numel() else 0) <= 0.5:
        drift = call.unfolded("out", _drift(call, parts, fixed, size, arithmetic, epsilon).reshape(*call.flat[:2], 1))
        lost = v.sum(1).view(call.batch, call.kv_heads, 1, -1).repeat_interleave(call.group, 1)
        lost = lost * (2 * normal + arithmetic.floor) + 2 * normal * (call.kv_len + 2)
        truth.trend = drift * truth.exact["out"].abs() + lost * ((call.kv_len + 1) if arithmetic.logsumexp else 1)
    if call.g is None:
        return
    g, dw, dx = call.g.abs(), parts.dw, parts.dx.abs()
    allow("dv", e_w + (rounded + epsilon * (of_keys + 3)) * w, g)
    e_dw = (g @ v.mT).view(call.shape) * (epsilon * (call.value_dim + 2))
    dw_size = dw.abs() + e_dw
    if call.softmax:
        e_mean = (e_w * dw_size + w * e_dw + epsilon * (of_queries + 3) * w * dw.abs()).sum(-1, keepdim=True)
        e_mean = e_mean + normal * of_queries
        centred = dw - parts.mean
        e_centred = e_dw + e_mean + epsilon * 2 * (dw.abs() + parts.mean.abs())
        e_dx = w * e_centred + e_w * (centred.abs() + e_centred) + 2 * epsilon * dx
        e_dx += (2 * normal) * call.seen * (call.value_dim * w + 3)
        e_dx *= call.seen
    else:
        e_dx = slope * e_dw + dw_size * (e_slope + epsilon * (arithmetic.exp + 4) * w) + 4 * epsilon * dx
        e_dx += (2 * normal) * call.seen * (call.value_dim * slope + 3)
    operand = rounded * dx
    if arithmetic.operands and call.dtype == torch.float16:  # ∂x lies scaled in float16: a share of its bound is lost
        longest = [float(x.norm(dim=-1).max()) if x.numel() else 0.0 for x in (g, v)]
        operand = operand + max(longest[0] * longest[1] * 2.0**-40, 2.0**-84) * call.seen
    allow("dq", e_dx + operand + epsilon * (of_queries + 3) * dx, k, abs(call.scale))
    allow("dk", e_dx + operand + epsilon * (of_keys + 3) * dx, q, abs(call.scale))
    # A tile, then the tiles of a row, then the rows: no longer chains than that.
    terms = epsilon * (float(of_queries.max()) + call.batch * call.q_len + 8) if call.seen.numel() else 0.0
    per_head_unit = torch.finfo(torch.float64 if call.dtype == torch.float64 else torch.float32).eps / 2
    for name in names[4:]:
        size = (e_dx + terms * dx) * (call.distance if name == "dslopes" else 1.0)
        total = size.sum((0, 3, 4)).reshape(-1) * SECOND_ORDER
        truth.allowed[name] = total + per_head_unit * truth.exact[name].abs() + 4 * normal * (1 + call.seen.sum())


def _drift(call: _Call, parts: Any, fixed: Tensor, size: Tensor, arithmetic: Arithmetic, epsilon: float) -> Tensor:
    """By what share of itself a row may be off in the same direction as all others, `[B, Hkv, group, Lq, 1]`.

    What is rounded once for many rows: the exponential, by its own systematic error; scale and log2 e, as constants;
    slope · distance + bias, which is the same in each row. In the mean over a row's weights.
    """
    constants = 2 * size + parts.x.abs() * (2 if arithmetic.reach or arithmetic.logsumexp else 0)
    if call.slopes is not None:
        constants = constants + 4 * fixed
    if not call.softmax:
        constants = constants * parts.left
    total = parts.w.sum(-1, keepdim=True)
    mean = (parts.w * constants).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
    drift: Tensor = epsilon * (2 if call.softmax else 1) * (arithmetic.exp + 1 + mean)
    return drift


def _precision(dtype: torch.dtype) -> tuple[float, float, float, float]:
    """(ε that is computed in, u of the dtype, smallest normal number computed with, smallest number of the dtype)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given, computed = torch.finfo(dtype), torch.finfo(wide)
    least = given.smallest_normal * (given.eps if dtype == torch.float16 else 1)
    return computed.eps / 2, given.eps / 2, computed.smallest_normal, least
