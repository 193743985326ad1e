"""`Twofold`: float64 tensors of twice the digits, so that float64 results have a truth to be held against.

A number is `high + low`, unevaluated, |low| at most half a unit of high. Sums and products of two numbers follow
Knuth and Dekker, matrix products Ozaki: operands are cut into slices of so few bits that BLAS adds up their products
without rounding. Relative errors stay near 2⁻⁷⁸ (of the largest terms, in matrix products). Operands must lie far from
overflow and underflow: whoever calls scales them by powers of two.
"""

from __future__ import annotations

import functools
import math
from decimal import Decimal, localcontext

import torch
from torch import Tensor

STEPS = 64  # of exp's table, per doubling of e^x


class Twofold:
    """high + low, two float64 tensors of one shape, with the operators that the definition needs."""

    __slots__ = ("high", "low")

    def __init__(self, high: Tensor, low: Tensor | None = None) -> None:
        self.high = high
        self.low = torch.zeros_like(high) if low is None else low

    @property
    def mT(self) -> Twofold:
        return Twofold(self.high.mT, self.low.mT)

    def view(self, *shape: int) -> Twofold:
        return Twofold(self.high.view(*shape), self.low.view(*shape))

    def masked(self, seen: Tensor) -> Twofold:
        """The numbers where `seen` (1.0 or 0.0), else 0."""
        return Twofold(self.high * seen, self.low * seen)

    def scaled(self, exponent: int) -> Twofold:
        """Times 2^exponent, in two steps so that the power itself is finite."""
        first = exponent // 2
        return Twofold(*(x * 2.0**first * 2.0 ** (exponent - first) for x in (self.high, self.low)))

    def __neg__(self) -> Twofold:
        return Twofold(-self.high, -self.low)

    def __add__(self, other: Twofold | Tensor) -> Twofold:
        high, low = (other.high, other.low) if isinstance(other, Twofold) else (other, None)
        total, error = _two_sum(self.high, high)
        error = error + self.low
        return _normal(total, error if low is None else error.add_(low))

    def __sub__(self, other: Twofold | Tensor) -> Twofold:
        return self + -other

    def __mul__(self, other: Twofold | Tensor | float) -> Twofold:
        if isinstance(other, float):
            other = self.high.new_tensor(other)
        high, low = (other.high, other.low) if isinstance(other, Twofold) else (other, None)
        product, error = _two_product(self.high, high)
        error = torch.addcmul(error, self.low, high)
        return _normal(product, error if low is None else error.addcmul_(self.high, low))

    def __matmul__(self, other: Twofold) -> Twofold:
        """Batched matrix product `[N, R, K] @ [N, K, C]`."""
        bits = (53 - math.ceil(math.log2(max(self.high.shape[-1], 2)))) // 2
        a1, a2, a3 = _slices(self, -1, bits)
        b1, b2, b3 = _slices(other, -2, bits)
        first = a1 @ b1  # exact, as the next
        second = torch.cat((a1, a2), -1) @ torch.cat((b2, b1), -2)
        rest = torch.cat((a3, self.high, a2), -1) @ torch.cat((other.high, b3, b2), -2)
        total, error = _two_sum(first, second)
        return _normal(total, error.add_(rest))

    def sum_last(self) -> Twofold:
        """The sum over the last axis, which is kept."""
        ones = Twofold(self.high.new_ones(1, self.high.shape[-1], 1))
        flat = self.view(1, -1, self.high.shape[-1]) @ ones
        return flat.view(*self.high.shape[:-1], 1)

    def reciprocal(self) -> Twofold:
        guess = 1 / self.high
        rest = -(self * guess) + torch.ones_like(guess)  # 1 − guess·self
        return _normal(guess, guess * rest.high)

    def exp(self) -> Twofold:
        """e^x = 2^n · 2^(k/64) · e^r with |r| ≤ ln 2 / 128; the power of e to the ninth term."""
        table, logs = _table()
        steps = (self.high * (STEPS / math.log(2))).clamp(-1500.0 * STEPS, 1500.0 * STEPS).round()
        r = Twofold(self.high - steps * logs[0], self.low)  # exact: steps has 17 bits, the first logarithm 32
        r = r - Twofold(*_two_product(steps, r.high.new_tensor(logs[1]))) - steps * logs[2]
        x = r.high
        tail = torch.full_like(x, 1 / math.factorial(9))
        for n in range(8, 2, -1):
            tail.mul_(x).add_(1 / math.factorial(n))
        power = r + (r * r) * 0.5 + tail.mul_(x).mul_(x).mul_(x)  # e^r − 1
        whole = torch.div(steps, STEPS, rounding_mode="floor")
        entry = table[:, (steps - whole * STEPS).long()]
        base = Twofold(entry[0], entry[1])
        e = base + base * power
        power_of_two = whole.long()
        first = power_of_two // 2  # in two steps, so that each power is finite
        last = power_of_two - first
        return Twofold(*(torch.ldexp(torch.ldexp(part, first), last) for part in (e.high, e.low)))

    def sigmoids(self) -> tuple[Twofold, Twofold]:
        """σ(x) and σ(−x), each to its own relative accuracy."""
        negative = self.high < 0
        size = Twofold(torch.where(negative, self.high, -self.high), torch.where(negative, self.low, -self.low))
        e = size.exp()
        large = (e + torch.ones_like(e.high)).reciprocal()
        small = e * large
        return _where(negative, small, large), _where(negative, large, small)


def _where(condition: Tensor, a: Twofold, b: Twofold) -> Twofold:
    return Twofold(torch.where(condition, a.high, b.high), torch.where(condition, a.low, b.low))


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and what rounding took, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)).add_(b - part)


def _normal(high: Tensor, low: Tensor) -> Twofold:
    """high + low with |low| at most half a unit of high, from |low| < |high|."""
    total = high + low
    return Twofold(total, (high - total).add_(low))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as two numbers of 26 bits (Dekker)."""
    big = x * 134217729.0  # 2^27 + 1
    high = big - (big - x)
    return high, x - high


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a·b rounded, and what rounding took, exactly (Dekker)."""
    product = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    error = (a1 * b1).sub_(product).add_(a1 * b2).add_(a2 * b1).add_(a2 * b2)
    return product, error


def _slices(x: Twofold, axis: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x as two parts of so many bits below the axis' largest number, and the rest."""
    exponent = torch.frexp(x.high.abs().amax(axis, keepdim=True)).exponent
    rounder = torch.ldexp(torch.full(exponent.shape, 1.5, dtype=torch.float64), exponent + 52 - bits)
    first = (x.high + rounder).sub_(rounder)
    rest = x.high - first
    rounder = rounder * 2.0**-bits
    second = (rest + rounder).sub_(rounder)
    return first, second, (rest - second).add_(x.low)


@functools.cache
def _table() -> tuple[Tensor, tuple[float, float, float]]:
    """2^(k/64) as high and low parts `[2, 64]`, and ln 2 / 64 in three parts of which the first has 32 bits."""
    with localcontext() as context:
        context.prec = 60
        powers = [Decimal(2) ** (Decimal(k) / STEPS) for k in range(STEPS)]
        parts = [[float(p) for p in powers], [float(p - Decimal(float(p))) for p in powers]]
        log = Decimal(2).ln() / STEPS
        first = math.ldexp(math.floor(math.ldexp(float(log), 38)), -38)
        second = float(log - Decimal(first))
        third = float(log - Decimal(first) - Decimal(second))
    return torch.tensor(parts, dtype=torch.float64), (first, second, third)
