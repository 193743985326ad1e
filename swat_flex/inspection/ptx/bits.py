"""Moves, comparisons and operations on bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import FLOATS, RAW, TYPES, Array, Mask, flushed, widened, width
from swat_flex.inspection.ptx.site import Site, Step

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
    write = site.sink(to, kind)
    if of.startswith("{"):
        names = site.vector(of)
        pieces = [site.source(name, f"b{8 * width(kind) // len(names)}") for name in names]
        return lambda m: write(np.stack(pieces, 1).view(TYPES[kind])[:, 0], m)
    x = site.source(of, kind)
    return lambda m: write(x, m)


def _to_address(site: Site) -> Step:
    """cvta: every space has one and the same addresses here."""
    kind = site.kind()
    site.take("to")
    site.need("global", "shared", "param")
    write, x = site.sink(site.operands[0], kind), site.source(site.operands[1], kind)
    return lambda m: write(x, m)


def _select(site: Site) -> Step:
    kind = site.kind()
    write, a, b = site.sink(site.operands[0], kind), *(site.source(x, kind) for x in site.operands[1:3])
    p = site.source(site.operands[3], "pred")
    return lambda m: write(np.where(p, a, b), m)


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
    targets = [name.strip() for name in site.operands[0].split("|")]
    writes = [site.sink(name, "pred") for name in targets]
    a, b = (site.source(x, kind) for x in site.operands[1:3])
    other = site.predicate(site.operands[3]) if joined else None
    if kind not in FLOATS and not ftz and not joined and len(writes) == 1:
        return lambda m: writes[0](compare(a, b), m)

    def numbers(x: Array) -> Array:
        x = widened(x) if kind == "bf16" else x
        return flushed(x) if ftz else x

    def run(m: Mask) -> None:
        p = compare(numbers(a), numbers(b))
        q = ~p
        if joined and other is not None:
            p, q = _LOGIC[joined](p, other()), _LOGIC[joined](q, other())
        for write, value in zip(writes, (p, q), strict=False):
            write(value, m)

    return run


def _logic(function: np.ufunc) -> Callable[[Site], Step]:
    def build(site: Site) -> Step:
        kind = site.kind()
        to, write = site.view(site.operands[0], kind), site.sink(site.operands[0], kind)
        given = [site.source(x, kind) for x in site.operands[1:]]

        def run(m: Mask) -> None:
            if m is None:
                function(*given, out=to)
            else:
                write(function(*given), m)

        return run

    return build


def _shift(left: bool) -> Callable[[Site], Step]:
    """Amounts of the width and beyond leave 0, or the sign."""
    function = np.left_shift if left else np.right_shift

    def build(site: Site) -> Step:
        kind = site.kind()
        bits, signed = 8 * width(kind), kind[0] == "s"
        write, a = site.sink(site.operands[0], kind), site.source(site.operands[1], kind)
        by = site.source(site.operands[2], "u32")

        def run(m: Mask) -> None:
            y = function(a, np.minimum(by, bits - 1).astype(a.dtype))
            if not signed:
                y = np.where(by >= bits, a.dtype.type(0), y)
            write(y, m)

        return run

    return build


def _extract(site: Site) -> Step:
    """bfe: a field of bits, with the sign of its highest for signed types; bits beyond the register are the sign."""
    kind = site.kind()
    bits, signed = int(kind[1:]), kind[0] == "s"
    write, a = site.sink(site.operands[0], kind), site.source(site.operands[1], kind)
    position, length = (site.source(x, "u32") for x in site.operands[2:])

    def run(m: Mask) -> None:
        first, count = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
        shifted = np.right_shift(a, np.minimum(first, bits - 1).astype(a.dtype))
        shifted = shifted if signed else np.where(first >= bits, a.dtype.type(0), shifted)
        rest = np.clip(bits - count, 0, bits - 1).astype(a.dtype)
        y = np.right_shift(np.left_shift(shifted, rest), rest)
        write(np.where(count == 0, a.dtype.type(0), y), m)

    return run


def _insert(site: Site) -> Step:
    kind = site.kind()
    bits = int(kind[1:])
    write, a, b = site.sink(site.operands[0], kind), *(site.source(x, kind) for x in site.operands[1:3])
    position, length = (site.source(x, "u32") for x in site.operands[3:])

    def run(m: Mask) -> None:
        first, count = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
        whole = np.minimum(count, bits)
        field = np.where(whole == 0, 0, ~np.uint64(0) >> (64 - np.maximum(whole, 1)).astype(np.uint64)).astype(
            np.uint64
        )
        at = np.minimum(first, 63).astype(np.uint64)
        field, moved = np.where(first < bits, field << at, 0), a.astype(np.uint64) << at
        write(((b & ~field) | (moved & field)).astype(a.dtype), m)

    return run


def _lop3(site: Site) -> Step:
    kind = site.kind()
    write, given = site.sink(site.operands[0], kind), [site.source(x, kind) for x in site.operands[1:4]]
    table = int(site.operands[4], 0)

    def run(m: Mask) -> None:
        y = np.zeros_like(given[0])
        for k in range(8):
            if table >> k & 1:
                a, b, c = (x if k >> s & 1 else ~x for x, s in zip(given, (2, 1, 0), strict=True))
                y |= a & b & c
        write(y, m)

    return run


def _permute(site: Site) -> Step:
    """prmt without a mode: each nibble of c picks a byte of {b, a}; its highest bit asks for that byte's sign."""
    kind = site.kind()
    if kind != "b32":
        raise Fault(f"is not known for {kind}")
    write, (a, b, c) = site.sink(site.operands[0], kind), [site.source(x, kind) for x in site.operands[1:4]]

    def run(m: Mask) -> None:
        pool, lane = np.stack([a, b], 1).view(np.uint8), np.arange(len(a))
        y = np.empty((len(a), 4), np.uint8)
        for k in range(4):
            picked = (c >> np.uint32(4 * k)) & np.uint32(15)
            byte = pool[lane, picked & 7]
            y[:, k] = np.where(picked & 8, np.where(byte & 128, np.uint8(255), np.uint8(0)), byte)
        write(y.view(np.uint32)[:, 0], m)

    return run


def _count(function: Callable[[Array], Array]) -> Callable[[Site], Step]:
    def build(site: Site) -> Step:
        kind = site.kind()
        if kind != "b32":
            raise Fault(f"is not known for {kind}")
        write, a = site.sink(site.operands[0], "b32"), site.source(site.operands[1], kind)
        return lambda m: write(function(a), m)

    return build


def _leading_zeros(x: Array) -> Array:
    highest = np.floor(np.log2(np.maximum(x, 1).astype(np.float64)))
    return np.where(x == 0, 32, 31 - highest).astype(np.uint32)


def _ones(x: Array) -> Array:
    ones: Array = np.unpackbits(x.view(np.uint8).reshape(len(x), 4), axis=1).sum(1).astype(np.uint32)
    return ones


BUILDERS: dict[str, Callable[[Site], Step]] = {
    "mov": _move,
    "cvta": _to_address,
    "selp": _select,
    "setp": _set_predicate,
    "and": _logic(np.bitwise_and),
    "or": _logic(np.bitwise_or),
    "xor": _logic(np.bitwise_xor),
    "not": _logic(np.invert),
    "shl": _shift(True),
    "shr": _shift(False),
    "bfe": _extract,
    "bfi": _insert,
    "lop3": _lop3,
    "prmt": _permute,
    "clz": _count(_leading_zeros),
    "popc": _count(_ones),
}
