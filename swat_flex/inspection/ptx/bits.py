"""Moves, comparisons and operations on bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from swat_flex.inspection.ptx.formats import FLOATS, RAW, TYPES, Array, Mask, flushed, widened, width
from swat_flex.inspection.ptx.site import Builder, Site, Step, plain

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _move(site: Site) -> Step:
    kind, (to, of) = site.kind(), site.operands
    if to.startswith("{"):
        names = site.vector(to)
        size = width(kind) // len(names)
        x, writes = site.source(of, kind), [site.sink(name, f"b{8 * size}") for name in names]

        def unpack(m: Mask) -> None:
            parts = x.view(RAW[size]).reshape(len(x), -1).copy()
            for n, write in enumerate(writes):
                write(parts[:, n], m)

        return unpack
    if of.startswith("{"):
        names, write = site.vector(of), site.sink(to, kind)
        pieces = [site.source(name, f"b{8 * width(kind) // len(names)}") for name in names]
        return lambda m: write(np.stack(pieces, 1).view(TYPES[kind])[:, 0], m)
    return site.computed(lambda x: x, kind, kind)


def _to_address(site: Site) -> Step:
    """cvta: every space has one and the same addresses here."""
    kind = site.kind()
    site.take("to")
    site.need("global", "shared", "param")
    return site.computed(lambda x: x, kind, kind)


def _comparison(name: str, kind: str) -> Callable[[Array, Array], Array]:
    """A comparison; of floating-point numbers, NaN makes all false but those that end in u."""
    if kind not in FLOATS:
        return _COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name.endswith("u") and name[:-1] in _COMPARE:
        return lambda a, b: _COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return _COMPARE[name]


def _set_predicate(site: Site) -> Step:
    kind = site.kind()
    unordered = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan") if kind in FLOATS else ()
    compare = _comparison(site.need(*_COMPARE, *unordered), kind)
    ftz = site.take("ftz") is not None
    joined = site.take(*_LOGIC)
    writes = [site.sink(name.strip(), "pred") for name in site.operands[0].split("|")]
    a, b = (site.source(x, kind) for x in site.operands[1:3])
    other = site.predicate(site.operands[3]) if joined else None

    def numbers(x: Array) -> Array:
        x = widened(x) if kind == "bf16" else x
        return flushed(x) if ftz else x

    def run(m: Mask) -> None:
        p = compare(numbers(a), numbers(b))
        for write, value in zip(writes, (p, ~p), strict=False):
            write(_LOGIC[joined](value, other()) if joined and other else value, m)

    return run


def _shifted(function: np.ufunc, a: Array, by: Array) -> Array:
    """Amounts of the width and beyond leave 0, or the sign."""
    bits = 8 * a.itemsize
    y: Array = function(a, np.minimum(by, bits - 1).astype(a.dtype))
    return y if a.dtype.kind == "i" else np.where(by >= bits, a.dtype.type(0), y)


def _extracted(a: Array, position: Array, length: Array) -> Array:
    """bfe: a field of bits, with the sign of its highest for signed types; bits beyond the register are the sign."""
    bits, first, count = 8 * a.itemsize, position & 255, (length & 255).astype(np.int64)
    rest = np.clip(bits - count, 0, bits - 1).astype(a.dtype)
    field = np.right_shift(np.left_shift(_shifted(np.right_shift, a, first), rest), rest)
    y: Array = np.where(count == 0, a.dtype.type(0), field)
    return y


def _inserted(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: b with its bits from `position` on replaced by the lowest `length` of a."""
    bits, first, count = 8 * a.itemsize, position & 255, length & 255
    ones = ~np.uint64(0) >> (64 - np.clip(count, 1, bits)).astype(np.uint64)
    at = np.minimum(first, 63).astype(np.uint64)
    field = np.where((count > 0) & (first < bits), ones << at, np.uint64(0))
    y: Array = (b & ~field) | ((a.astype(np.uint64) << at) & field)
    return y.astype(a.dtype)


def _lop3(site: Site) -> Step:
    kind, table = site.kind(), int(site.operands[4], 0)

    def combined(*given: Array) -> Array:
        y = np.zeros_like(given[0])
        for k in range(8):
            if table >> k & 1:
                a, b, c = (x if k >> s & 1 else ~x for x, s in zip(given, (2, 1, 0), strict=True))
                y |= a & b & c
        return y

    return site.computed(combined, kind, kind, kind, kind)


def _permuted(a: Array, b: Array, c: Array) -> Array:
    """prmt without a mode: each nibble of c picks a byte of {b, a}; its highest bit asks for that byte's sign."""
    pool, lane = np.stack([a, b], 1).view(np.uint8), np.arange(len(a))
    y = np.empty((len(a), 4), np.uint8)
    for k in range(4):
        picked = (c >> np.uint32(4 * k)) & np.uint32(15)
        byte = pool[lane, picked & 7]
        y[:, k] = np.where(picked & 8, np.where(byte & 128, np.uint8(255), np.uint8(0)), byte)
    return y.view(np.uint32)[:, 0]


def _leading_zeros(x: Array) -> Array:
    highest = np.floor(np.log2(np.maximum(x, 1).astype(np.float64)))
    return np.where(x == 0, 32, 31 - highest).astype(np.uint32)


def _ones(x: Array) -> Array:
    ones: Array = np.unpackbits(x.view(np.uint8).reshape(len(x), 4), axis=1).sum(1).astype(np.uint32)
    return ones


BUILDERS: dict[str, Builder] = {
    "mov": _move,
    "cvta": _to_address,
    "selp": plain(lambda a, b, p: np.where(p, a, b), 2, "pred"),
    "setp": _set_predicate,
    "and": plain(np.bitwise_and, 2),
    "or": plain(np.bitwise_or, 2),
    "xor": plain(np.bitwise_xor, 2),
    "not": plain(np.invert, 1),
    "shl": plain(partial(_shifted, np.left_shift), 1, "u32"),
    "shr": plain(partial(_shifted, np.right_shift), 1, "u32"),
    "bfe": plain(_extracted, 1, "u32", "u32"),
    "bfi": plain(_inserted, 2, "u32", "u32"),
    "lop3": _lop3,
    "prmt": plain(_permuted, 3, known=("b32",)),
    "clz": plain(_leading_zeros, 1, known=("b32",)),
    "popc": plain(_ones, 1, known=("b32",)),
}
