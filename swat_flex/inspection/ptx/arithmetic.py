"""Arithmetic: numbers in, numbers out, with the rounding that each instruction has.

The approximations of the hardware (.approx, .full) are computed as numpy computes them in float32, which is at least as
near to the exact result; their very bits are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import (
    TYPES,
    Array,
    flushed,
    fused,
    in_float64,
    is_integer,
    odd_sum,
    out_of_float64,
    saturated,
)
from swat_flex.inspection.ptx.site import Builder, Site, Step, plain

_ROUNDINGS = ("rn", "rz", "rm", "rp")


def _real(site: Site, kind: str, count: int, native: Callable[..., Any], exact: Callable[..., Any] | None) -> Step:
    """A function of floating-point numbers: `native` rounds float32 to the nearest, `exact` gives float64, odd."""
    kinds = [kind] * (count + 1)
    mode = site.take(*_ROUNDINGS) or "rn"
    ftz, sat = site.take("ftz") is not None, site.take("sat") is not None
    if kind == "f64":
        if mode != "rn" or ftz or sat or native is fused:
            raise Fault(f"is not known for float64 with {mode}")
        return site.computed(native, *kinds)
    if sat and kind.startswith("bf16"):
        raise Fault("is not known for bfloat16 with sat")
    if kind.startswith("f32") and mode == "rn":
        rounded = native
    elif exact is None or (ftz and not kind.startswith("f32")):
        raise Fault(f"is not known for {kind} with {mode}")
    else:

        def rounded(*given: Array) -> Array:
            return out_of_float64(exact(*(in_float64(x, kind) for x in given)), kind, mode)

    if not ftz and not sat:
        return site.computed(rounded, *kinds)

    def modified(*given: Array) -> Array:
        y = rounded(*(flushed(x) if ftz else x for x in given))
        y = flushed(y) if ftz else y
        return saturated(y) if sat else y

    return site.computed(modified, *kinds)


def _integer_or_real(integer: np.ufunc, exact: Callable[..., Array], site: Site) -> Step:
    kind = site.kind()
    if is_integer(kind):
        return site.computed(integer, kind, kind, kind)
    return _real(site, kind, 2, integer, exact)


def _twice(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def _multiply(site: Site) -> Step:
    kind = site.kind()
    if not is_integer(kind):
        return _real(site, kind, 2, np.multiply, np.multiply)
    part = site.need("lo", "hi", "wide")
    if part == "lo":
        return site.computed(np.multiply, kind, kind, kind)
    if kind[1:] == "64":
        raise Fault("is not known for 64 bits")
    wide = TYPES[_twice(kind)]
    whole = partial(np.multiply, dtype=wide)
    if part == "wide":
        return site.computed(whole, _twice(kind), kind, kind)
    return site.computed(lambda a, b: (whole(a, b) >> wide(int(kind[1:]))).astype(TYPES[kind]), kind, kind, kind)


def _multiply_add(site: Site) -> Step:
    kind, part = site.kind(), site.need("lo", "wide")
    wide = _twice(kind) if part == "wide" else kind
    return site.computed(lambda a, b, c: np.multiply(a, b, dtype=TYPES[wide]) + c, wide, kind, kind, wide)


def _fma(site: Site) -> Step:
    kind = site.kind()
    if not any(mode in site.modifiers for mode in _ROUNDINGS):
        raise Fault("expects a rounding")
    return _real(site, kind, 3, fused, lambda a, b, c: odd_sum(a * b, c))


def _extreme(smaller: bool, site: Site) -> Step:
    """min or max; of −0 and +0 the former is smaller, and a NaN counts only with .NaN."""
    propagates, ignores = (np.minimum, np.fmin) if smaller else (np.maximum, np.fmax)
    kind = site.kind()
    if is_integer(kind):
        return site.computed(propagates, kind, kind, kind)
    if kind not in ("f32", "f16", "f64"):
        raise Fault(f"is not known for {kind}")
    ftz = site.take("ftz") is not None
    function = propagates if site.take("NaN") else ignores

    def run(a: Array, b: Array) -> Array:
        a, b = (flushed(a), flushed(b)) if ftz else (a, b)
        y: Array = function(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            sign = np.signbit(a) | np.signbit(b) if smaller else np.signbit(a) & np.signbit(b)
            y = np.where(zeros, np.where(sign, y.dtype.type(-0.0), y.dtype.type(0.0)), y)
        return y

    return site.computed(run, kind, kind, kind)


def _sign(function: np.ufunc, of_bits: Callable[[Array], Array], site: Site) -> Step:
    """neg or abs, also of bfloat16's bits."""
    kind = site.kind()
    if kind.startswith("bf16"):
        return site.computed(of_bits, kind, kind)
    ftz = site.take("ftz") is not None
    return site.computed((lambda x: flushed(function(x))) if ftz else function, kind, kind)


def _divide(site: Site) -> Step:
    kind = site.kind()
    if is_integer(kind):
        return site.computed(_quotient, kind, kind, kind)
    if (kind == "f32" and site.take("full", "approx")) or (kind in ("f32", "f64") and site.take("rn")):
        return _real(site, kind, 2, np.divide, None)
    raise Fault("is a division that is not known")


def _quotient(a: Array, b: Array) -> Array:
    """a / b towards 0; all bits set where b is 0, as the hardware does."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    q: Array = np.floor_divide(a, safe)
    q = q + ((np.remainder(a, safe) != 0) & ((a < 0) != (b < 0))).astype(q.dtype)
    return np.where(b == 0, ~b.dtype.type(0), q)


def _remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


def _approximate(function: Callable[[Array], Array], site: Site) -> Step:
    kind = site.kind("f32")
    site.need("approx", "rn")
    ftz = site.take("ftz") is not None
    return site.computed((lambda x: flushed(function(flushed(x)))) if ftz else function, kind, kind)


BUILDERS: dict[str, Builder] = {
    "add": partial(_integer_or_real, np.add, odd_sum),
    "sub": partial(_integer_or_real, np.subtract, lambda a, b: odd_sum(a, -b)),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _fma,
    "min": partial(_extreme, True),
    "max": partial(_extreme, False),
    "neg": partial(_sign, np.negative, lambda bits: bits ^ np.uint16(0x8000)),
    "abs": partial(_sign, np.abs, lambda bits: bits & np.uint16(0x7FFF)),
    "div": _divide,
    "rem": plain(_remainder, 2),
    "ex2": partial(_approximate, np.exp2),
    "lg2": partial(_approximate, np.log2),
    "rcp": partial(_approximate, np.reciprocal),
    "tanh": partial(_approximate, np.tanh),
    "sqrt": partial(_approximate, np.sqrt),
    "rsqrt": partial(_approximate, lambda x: (1 / np.sqrt(x)).astype(x.dtype)),
    "sin": partial(_approximate, np.sin),
    "cos": partial(_approximate, np.cos),
}
