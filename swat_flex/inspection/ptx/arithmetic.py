"""Arithmetic: numbers in, numbers out, with the rounding that each instruction has.

The approximations of the hardware (.approx, .full) are computed as numpy computes them in float32, which is at least as
near to the exact result; their very bits are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import (
    TYPES,
    Array,
    Mask,
    flushed,
    fused,
    in_float64,
    is_integer,
    odd_sum,
    out_of_float64,
    saturated,
)
from swat_flex.inspection.ptx.site import Site, Step

_ROUNDINGS = ("rn", "rz", "rm", "rp")


def _apply(site: Site, kind: str, count: int, function: Callable[..., Any]) -> Step:
    """d = function of `count` operands, all of one type that numpy computes with."""
    given = [site.source(x, kind) for x in site.operands[1 : count + 1]]
    if isinstance(function, np.ufunc):
        to = site.view(site.operands[0], kind)
        wide = kind.endswith("x2")

        def run(m: Mask) -> None:
            if m is None:
                function(*given, out=to)
            else:
                np.copyto(to, function(*given), where=np.repeat(m, 2) if wide else m)

        return run
    write = site.sink(site.operands[0], kind)
    return lambda m: write(function(*given), m)


def _real(
    site: Site, kind: str, count: int, native: Callable[..., Any], exact: Callable[..., Any] | None
) -> Step:  # fmt: skip
    """A function of floating-point numbers: `native` rounds float32 to the nearest, `exact` gives float64, odd."""
    mode = site.take(*_ROUNDINGS) or "rn"
    ftz, sat = site.take("ftz") is not None, site.take("sat") is not None
    if kind == "f64":
        if mode != "rn" or ftz or sat or native is fused:
            raise Fault(f"is not known for float64 with {mode}")
        return _apply(site, kind, count, native)
    if kind.startswith("f32") and mode == "rn":
        if not ftz and not sat:
            return _apply(site, kind, count, native)

        def run(*given: Array) -> Array:
            y = native(*(flushed(x) if ftz else x for x in given))
            y = flushed(y) if ftz else y
            return saturated(y) if sat else y

        return _apply(site, kind, count, run)
    if exact is None or (ftz and not kind.startswith("f32")):
        raise Fault(f"is not known for {kind} with {mode}")

    def rounded(*given: Array) -> Array:
        y = out_of_float64(exact(*(in_float64(flushed(x) if ftz else x, kind) for x in given)), kind, mode)
        y = flushed(y) if ftz else y
        return saturated(y) if sat and not kind.startswith("bf16") else y

    if sat and kind.startswith("bf16"):
        raise Fault("is not known for bfloat16 with sat")
    return _apply(site, kind, count, rounded)


def _integer_or_real(integer: np.ufunc, exact: Callable[..., Array]) -> Callable[[Site], Step]:
    def build(site: Site) -> Step:
        kind = site.kind()
        return _apply(site, kind, 2, integer) if is_integer(kind) else _real(site, kind, 2, integer, exact)

    return build


def _twice(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def _multiply(site: Site) -> Step:
    kind = site.kind()
    if not is_integer(kind):
        return _real(site, kind, 2, np.multiply, np.multiply)
    part = site.need("lo", "hi", "wide")
    if part == "lo":
        return _apply(site, kind, 2, np.multiply)
    if kind[1:] == "64":
        raise Fault("is not known for 64 bits")
    a, b = (site.source(x, kind) for x in site.operands[1:])
    wide = TYPES[_twice(kind)]
    if part == "wide":
        write = site.sink(site.operands[0], _twice(kind))
        return lambda m: write(np.multiply(a, b, dtype=wide), m)
    write, by = site.sink(site.operands[0], kind), wide(int(kind[1:]))
    return lambda m: write((np.multiply(a, b, dtype=wide) >> by).astype(TYPES[kind]), m)


def _multiply_add(site: Site) -> Step:
    kind, part = site.kind(), site.need("lo", "wide")
    wide = _twice(kind) if part == "wide" else kind
    a, b = (site.source(x, kind) for x in site.operands[1:3])
    c, write = site.source(site.operands[3], wide), site.sink(site.operands[0], wide)
    return lambda m: write(np.multiply(a, b, dtype=TYPES[wide]) + c, m)


def _fma(site: Site) -> Step:
    kind = site.kind()
    if not any(mode in site.modifiers for mode in _ROUNDINGS):
        raise Fault("expects a rounding")
    return _real(site, kind, 3, fused, lambda a, b, c: odd_sum(a * b, c))


def _extreme(smaller: bool) -> Callable[[Site], Step]:
    """min or max; of −0 and +0 the former is smaller, and a NaN counts only with .NaN."""
    propagates, ignores = (np.minimum, np.fmin) if smaller else (np.maximum, np.fmax)

    def build(site: Site) -> Step:
        kind = site.kind()
        if is_integer(kind):
            return _apply(site, kind, 2, propagates)
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

        return _apply(site, kind, 2, run)

    return build


def _sign(function: np.ufunc) -> Callable[[Site], Step]:
    def build(site: Site) -> Step:
        kind = site.kind()
        if kind.startswith("bf16"):
            flip, mask = (
                (np.uint16(0x8000), np.uint16(0xFFFF)) if function is np.negative else (np.uint16(0), np.uint16(0x7FFF))
            )
            return _apply(site, kind, 1, lambda x: (x ^ flip) & mask)
        ftz = site.take("ftz") is not None
        return _apply(site, kind, 1, (lambda x: flushed(function(x))) if ftz else function)

    return build


def _divide(site: Site) -> Step:
    kind = site.kind()
    if is_integer(kind):
        return _apply(site, kind, 2, _quotient)
    if kind == "f32" and site.take("full", "approx"):
        return _real(site, kind, 2, np.divide, None)
    if site.take("rn") and kind in ("f32", "f64"):
        return _real(site, kind, 2, np.divide, None)
    raise Fault("is a division that is not known")


def _quotient(a: Array, b: Array) -> Array:
    """a / b towards 0; all bits set where b is 0, as the hardware does."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    q: Array = np.floor_divide(a, safe)
    q = q + ((np.remainder(a, safe) != 0) & ((a < 0) != (b < 0))).astype(q.dtype)
    return np.where(b == 0, ~b.dtype.type(0), q)


def _remainder(site: Site) -> Step:
    return _apply(
        site, site.kind(), 2, lambda a, b: np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))
    )


def _approximate(function: Callable[[Array], Array]) -> Callable[[Site], Step]:
    def build(site: Site) -> Step:
        kind = site.kind()
        if kind != "f32":
            raise Fault(f"is not known for {kind}")
        site.need("approx", "rn")
        ftz = site.take("ftz") is not None
        return _apply(site, kind, 1, (lambda x: flushed(function(flushed(x)))) if ftz else function)

    return build


BUILDERS: dict[str, Callable[[Site], Step]] = {
    "add": _integer_or_real(np.add, odd_sum),
    "sub": _integer_or_real(np.subtract, lambda a, b: odd_sum(a, -b)),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _fma,
    "min": _extreme(True),
    "max": _extreme(False),
    "neg": _sign(np.negative),
    "abs": _sign(np.abs),
    "div": _divide,
    "rem": _remainder,
    "ex2": _approximate(np.exp2),
    "lg2": _approximate(np.log2),
    "rcp": _approximate(np.reciprocal),
    "tanh": _approximate(np.tanh),
    "sqrt": _approximate(np.sqrt),
    "rsqrt": _approximate(lambda x: (1 / np.sqrt(x)).astype(x.dtype)),
    "sin": _approximate(np.sin),
    "cos": _approximate(np.cos),
}
