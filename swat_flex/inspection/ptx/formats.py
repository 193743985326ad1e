"""Number formats of PTX on numpy arrays, and rounding once as IEEE 754 asks.

What must be rounded once is computed in float64 rounded to odd (of two neighbours the one whose last bit is set):
rounding that to a format of at most 51 bits, in any direction, gives what rounding the exact number gives.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Mask: TypeAlias = Array | None  # which threads run; None is all of them

# By PTX type, what numpy calls one element; packed types have two, and bfloat16 is kept as its bits.
TYPES: dict[str, Any] = {
    "pred": np.bool_, "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16,
    "b16": np.uint16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64,
    "b64": np.uint64, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.uint16,
    "f16x2": np.float16, "bf16x2": np.uint16, "f32x2": np.float32, "tf32": np.uint32,
}  # fmt: skip
RAW: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
FLOATS = ("f16", "bf16", "f32", "f64")

_INFINITY = np.float64(np.inf)


def width(kind: str) -> int:
    """Bytes of a register of this type."""
    return int(np.dtype(TYPES[kind]).itemsize) * (2 if kind.endswith("x2") else 1)


def is_integer(kind: str) -> bool:
    return kind[0] in "usb" and not kind.startswith("bf")


def flushed(x: Array) -> Array:
    """float32 with subnormal numbers replaced by 0 of their sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def saturated(x: Array) -> Array:
    """Numbers held to [0, 1]; 0 for NaN."""
    return np.clip(np.where(np.isnan(x), x.dtype.type(0), x), 0, 1).astype(x.dtype)


def widened(bits: Array) -> Array:
    """bfloat16, given as its bits, in float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16(x: Array) -> Array:
    """The bits of float32 rounded to the nearest bfloat16, ties to even; 0x7FFF for NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_tf32(x: Array) -> Array:
    """The bits of float32 rounded to the nearest TF32 (10 fraction bits), ties away from 0."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd."""
    total = a + b
    of_b = total - a
    error = (a - (total - of_b)) + (b - of_b)
    even = (total.view(np.int64) & 1) == 0
    moved = even & (error != 0) & np.isfinite(total)
    return np.where(moved, np.nextafter(total, np.copysign(_INFINITY, error)), total)


def narrowed(x: Array, mode: str = "rn") -> Array:
    """float64 (rounded to odd) as float32: rn to the nearest, rz towards 0, rm towards −∞, rp towards +∞."""
    y = x.astype(np.float32)
    if mode == "rz":
        return np.where(np.abs(y) > np.abs(x), np.nextafter(y, np.float32(0)), y)
    if mode == "rm":
        return np.where(y > x, np.nextafter(y, np.float32(-np.inf)), y)
    if mode == "rp":
        return np.where(y < x, np.nextafter(y, np.float32(np.inf)), y)
    return y


def fused(a: Array, b: Array, c: Array) -> Array:
    """a·b + c of float32, rounded once to the nearest.

    The product is exact in float64. The sum rounded there and again to float32 is rounded once too, unless the first
    rounding lands on the middle between two float32 or below the normal ones; those few are done again.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    y = total.astype(np.float32)
    tie = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    tie |= np.abs(total) < 2.0**-125
    if tie.any():
        tie &= total != 0
        y[tie] = odd_sum(product[tie], np.broadcast_to(c, y.shape)[tie].astype(np.float64)).astype(np.float32)
    return y


def in_float64(x: Array, kind: str) -> Array:
    """Numbers of a type, exactly."""
    return (widened(x) if kind.startswith("bf16") else x).astype(np.float64)


def out_of_float64(x: Array, kind: str, mode: str = "rn") -> Array:
    """float64 (rounded to odd) rounded to a type; all but float32 to the nearest."""
    if kind.startswith("f32"):
        return narrowed(x, mode)
    if kind.startswith("f16"):
        return x.astype(np.float16)
    if kind.startswith("bf16"):
        y = narrowed(x, "rz")
        odd = y.view(np.uint32) | np.uint32(1)
        return bfloat16(np.where(y != x, odd.view(np.float32), y))
    return x
