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
    Mask,
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
from swat_flex.inspection.ptx.site import Site, Step, Write

_TO_WHOLE: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip


def _convert(site: Site) -> Step:
    of, to = site.kind(), site.kind()
    if to in ("bf16x2", "f16x2") and of == "f32":
        return _pack(site, to)
    read, write = _narrow_source(site, of), _wide_sink(site, to)
    if is_integer(of) and is_integer(to):
        return _integers(site, read, write, of, to)
    if of in FLOATS and is_integer(to):
        return _to_integer(site, read, write, of, to)
    if is_integer(of) and to in FLOATS:
        mode = site.need("rn", "rz", "rm", "rp")
        if to == "f32" and mode == "rn":
            return lambda m: write(read().astype(np.float32), m)
        if width(of) == 8 or to == "bf16":
            raise Fault(f"is not known from {of} to {to} with {mode}")
        return lambda m: write(out_of_float64(read().astype(np.float64), to, mode), m)
    if of == "f32" and to == "tf32":
        site.need("rna")
        return lambda m: write(to_tf32(read()), m)
    return _reals(site, read, write, of, to)


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


def _wide_sink(site: Site, kind: str) -> Write:
    """Write values of `kind` to a register, which may be wider: integers are extended by sign or by zeros."""
    text = site.operands[0]
    size = site.register(text).itemsize
    if size == width(kind):
        return site.sink(text, kind)
    if size < width(kind) or not is_integer(kind):
        raise Fault(f"writes {kind} to {text}, a register of {8 * size} bits")
    return site.sink(text, f"{'s' if kind[0] == 's' else 'u'}{8 * size}")


def _pack(site: Site, to: str) -> Step:
    """Two float32 in one register, the first operand in the upper half."""
    site.need("rn")
    relu = site.take("relu") is not None
    write = site.sink(site.operands[0], "b32")
    high, low = (site.source(x, "f32") for x in site.operands[1:3])

    def half(x: Array) -> Array:
        x = np.where(x < 0, np.float32(0), x) if relu else x
        return (bfloat16(x) if to == "bf16x2" else x.astype(np.float16).view(np.uint16)).astype(np.uint32)

    return lambda m: write(half(low) | (half(high) << np.uint32(16)), m)


def _integers(site: Site, read: Callable[[], Array], write: Write, of: str, to: str) -> Step:
    if site.take("sat") is None:
        return lambda m: write(read().astype(TYPES[to]), m)
    info = np.iinfo(TYPES[to])
    if width(of) == 8:
        raise Fault(f"is not known from {of} to {to} with sat")
    return lambda m: write(np.clip(read().astype(np.int64), info.min, info.max).astype(TYPES[to]), m)


def _to_integer(site: Site, read: Callable[[], Array], write: Write, of: str, to: str) -> Step:
    """Out of range the nearest integer there is, for NaN 0."""
    rounding = _TO_WHOLE[site.need(*_TO_WHOLE)]
    ftz = site.take("ftz") is not None
    site.take("sat")  # integers are saturated anyway
    info = np.iinfo(TYPES[to])

    def run(m: Mask) -> None:
        x = rounding(in_float64(flushed(read()) if ftz else read(), of))
        inside = np.where(np.isnan(x) | (x >= float(info.max)) | (x <= float(info.min)), 0, x).astype(TYPES[to])
        y = np.where(
            x >= float(info.max), TYPES[to](info.max), np.where(x <= float(info.min), TYPES[to](info.min), inside)
        )
        write(y, m)

    return run


def _reals(site: Site, read: Callable[[], Array], write: Write, of: str, to: str) -> Step:
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

    def run(m: Mask) -> None:
        x = flushed(read()) if ftz and of == "f32" else read()
        if of == "bf16" and to == "f32":
            x = widened(x)
        elif of == "f32" and to == "bf16":
            x = bfloat16(x)
        elif of != to:
            x = out_of_float64(in_float64(x, of), to, mode or "rn")
        x = _TO_WHOLE[whole](x) if whole else x
        x = flushed(x) if ftz and to == "f32" else x
        write(saturated(x) if sat else x, m)

    return run


BUILDERS: dict[str, Callable[[Site], Step]] = {"cvt": _convert}
