"""cvt: between number formats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import (
    FLOATS,
    RAW,
    TYPES,
    Array,
    bfloat16,
    flushed,
    in_float64,
    is_integer,
    out_of_float64,
    saturated,
    to_tf32,
    widened,
    width,
)
from swat_flex.inspection.ptx.site import Builder, Site, Step

_TO_WHOLE: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip


def _convert(site: Site) -> Step:
    of, to = site.kind(), site.kind()
    if to in ("bf16x2", "f16x2") and of == "f32":
        return _pack(site, to)
    read, write = _narrow_source(site, of), site.wide_sink(site.operands[0], to)
    converted = _conversion(site, of, to)
    return lambda m: write(converted(read()), m)


def _conversion(site: Site, of: str, to: str) -> Callable[[Array], Array]:
    if is_integer(of) and is_integer(to):
        return _between_integers(site, of, to)
    if of in FLOATS and is_integer(to):
        return _to_integer(site, of, to)
    if is_integer(of) and to in FLOATS:
        mode = site.need("rn", "rz", "rm", "rp")
        if to == "f32" and mode == "rn":
            return lambda x: x.astype(np.float32)
        if width(of) == 8 or to == "bf16":
            raise Fault(f"is not known from {of} to {to} with {mode}")
        return lambda x: out_of_float64(x.astype(np.float64), to, mode)
    if of == "f32" and to == "tf32":
        site.need("rna")
        return to_tf32
    return _between_reals(site, of, to)


def _narrow_source(site: Site, kind: str) -> Callable[[], Array]:
    """Read an operand as `kind`; of a wider register the low bits."""
    text = site.operands[1]
    if text not in site.instruction.scope or site.register(text).itemsize == width(kind):
        x = site.source(text, kind)
        return lambda: x
    wide, raw = site.register(text), RAW[width(kind)]
    if wide.itemsize < width(kind):
        raise Fault(f"takes {text} as {kind}, a register of {8 * wide.itemsize} bits")
    return lambda: wide.astype(raw).view(TYPES[kind])


def _pack(site: Site, to: str) -> Step:
    """Two float32 in one register, the first operand in the upper half."""
    site.need("rn")
    relu = site.take("relu") is not None

    def half(x: Array) -> Array:
        x = np.where(x < 0, np.float32(0), x) if relu else x
        return (bfloat16(x) if to == "bf16x2" else x.astype(np.float16).view(np.uint16)).astype(np.uint32)

    return site.computed(lambda high, low: half(low) | (half(high) << np.uint32(16)), "b32", "f32", "f32")


def _between_integers(site: Site, of: str, to: str) -> Callable[[Array], Array]:
    if site.take("sat") is None:
        return lambda x: x.astype(TYPES[to])
    info = np.iinfo(TYPES[to])
    if width(of) == 8:
        raise Fault(f"is not known from {of} to {to} with sat")
    return lambda x: np.clip(x.astype(np.int64), info.min, info.max).astype(TYPES[to])


def _to_integer(site: Site, of: str, to: str) -> Callable[[Array], Array]:
    """Out of range the nearest integer there is, for NaN 0."""
    rounding = _TO_WHOLE[site.need(*_TO_WHOLE)]
    ftz = site.take("ftz") is not None
    site.take("sat")  # integers are saturated anyway
    info = np.iinfo(TYPES[to])

    def converted(x: Array) -> Array:
        x = rounding(in_float64(flushed(x) if ftz else x, of))
        high, low = x >= float(info.max), x <= float(info.min)
        inside = np.where(np.isnan(x) | high | low, 0, x).astype(TYPES[to])
        return np.where(high, TYPES[to](info.max), np.where(low, TYPES[to](info.min), inside))

    return converted


def _between_reals(site: Site, of: str, to: str) -> Callable[[Array], Array]:
    if of not in FLOATS or to not in FLOATS:
        raise Fault(f"is not known from {of} to {to}")
    whole = site.take(*_TO_WHOLE)
    mode = "rn" if whole else site.take("rn", "rz", "rm", "rp")
    ftz, sat = site.take("ftz") is not None, site.take("sat") is not None
    if width(to) < width(of) and mode is None:
        raise Fault("expects a rounding")
    if mode not in (None, "rn") and to != "f32":
        raise Fault(f"is not known from {of} to {to} with {mode}")
    if to == "bf16" and (sat or whole):
        raise Fault("is not known to bfloat16 with such a modifier")

    def converted(x: Array) -> Array:
        x = flushed(x) if ftz and of == "f32" else x
        if of == "bf16" and to == "f32":
            x = widened(x)
        elif of == "f32" and to == "bf16":
            x = bfloat16(x)
        elif of != to:
            x = out_of_float64(in_float64(x, of), to, mode or "rn")
        x = _TO_WHOLE[whole](x) if whole else x
        x = flushed(x) if ftz and to == "f32" else x
        return saturated(x) if sat else x

    return converted


BUILDERS: dict[str, Builder] = {"cvt": _convert}
