"""Matrix instructions of a warp: ldmatrix, stmatrix and mma.sync.

A fragment holds of an 8×8 matrix of 16-bit numbers in thread 4·r + c the columns 2c and 2c + 1 of row r. Products are
summed in float32 in an order of numpy's; how a tensor core rounds inside of one instruction is not documented.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import Array, Mask, widened
from swat_flex.inspection.ptx.loads import SHARED
from swat_flex.inspection.ptx.site import Builder, Site, Step


def halves(x: Array, kind: str) -> Array:
    """16-bit numbers in float32, twice as many as registers of 32 bits."""
    return widened(x.view(np.uint16)) if kind == "bf16" else x.view(np.float16).astype(np.float32)


def _matrices(site: Site) -> tuple[int, bool]:
    """Take what ldmatrix and stmatrix have in common; return the number of matrices and whether they are transposed."""
    site.kind("b16")
    for name in ("sync", "aligned", "m8n8"):
        site.need(name)
    site.need(*SHARED)
    return int(site.need("x1", "x2", "x4")[1]), site.take("trans") is not None


def _rows(site: Site, text: str, count: int) -> Callable[[Mask], tuple[Array, Array, Array]]:
    """Return what gives warps that run, and for each of their 8·count rows its address and the lane that names it."""
    at, machine = site.address(text), site.machine

    def find(m: Mask) -> tuple[Array, Array, Array]:
        warps = machine.groups_of(m)
        lanes = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        return warps, at(lanes), lanes

    return find


def _load(site: Site) -> Step:
    count, flipped = _matrices(site)
    names = site.vector(site.operands[0])
    writes, rows = [site.sink(x, "b32") for x in names], _rows(site, site.operands[1], count)
    if len(names) != count:
        raise Fault(f"expects {count} registers")
    machine = site.machine

    def run(m: Mask) -> None:
        _, address, lanes = rows(m)
        found = machine.shared.read(address, 16, lanes).view(np.uint16).reshape(-1, count, 8, 8)
        if flipped:
            found = np.ascontiguousarray(found.transpose(0, 1, 3, 2))
        fragments = np.ascontiguousarray(found.view(np.uint32).reshape(-1, count, 32).transpose(1, 0, 2))
        for write, fragment in zip(writes, fragments, strict=True):
            write(machine.spread(fragment.reshape(-1), m), m)

    return run


def _store(site: Site) -> Step:
    count, flipped = _matrices(site)
    values, rows = [site.source(x, "b32") for x in site.vector(site.operands[1])], _rows(site, site.operands[0], count)
    if len(values) != count:
        raise Fault(f"expects {count} registers")
    machine = site.machine

    def run(m: Mask) -> None:
        warps, address, lanes = rows(m)
        found = np.stack([x.reshape(-1, 32) for x in values], 1)[warps].view(np.uint16).reshape(-1, count, 8, 8)
        if flipped:
            found = np.ascontiguousarray(found.transpose(0, 1, 3, 2))
        machine.shared.write(address, found.reshape(-1, 8).view(np.uint8), lanes)

    return run


# Depths of m16n8, by operand type.
_SHAPES = {"bf16": ("m16n8k16", "m16n8k8"), "f16": ("m16n8k16", "m16n8k8"), "tf32": ("m16n8k8", "m16n8k4")}


def _multiply(site: Site) -> Step:
    """d = a·b + c of a warp: a [16, K] by rows, b [K, 8] by columns, c and d [16, 8]."""
    last, kind, first = (site.kind() for _ in range(3))
    if site.kind() != "f32" or last != "f32" or kind != first or kind not in _SHAPES:
        raise Fault("is not known for these types")
    for name in ("sync", "aligned", "row", "col"):
        site.need(name)
    shape = site.need(*_SHAPES[kind])
    d, a, b, c = (site.vector(x) for x in site.operands)
    packed = kind != "tf32"
    deep = 2 if shape == _SHAPES[kind][0] else 1  # fragments along K
    if (len(d), len(a), len(b), len(c)) != (4, 2 * deep, deep, 4):
        raise Fault("has fragments of another size")
    writes, sums = [site.sink(x, "f32") for x in d], [site.source(x, "f32") for x in c]
    left, right = ([site.source(x, "b32") for x in xs] for xs in (a, b))
    each, warps, machine = 2 if packed else 1, site.machine.lanes // 32, site.machine

    def numbers(registers: list[Array]) -> Array:
        x = np.stack(registers)
        found = halves(x, kind) if packed else (x & np.uint32(0xFFFFE000)).view(np.float32)
        return found.reshape(len(registers), warps, 8, 4, each)

    def run(m: Mask) -> None:
        machine.groups_of(m)
        x = numbers(left).reshape(deep, 2, warps, 8, 4, each)  # K half, row half, warp, row, column, element
        x = x.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, deep * 4 * each)
        y = numbers(right).transpose(1, 0, 3, 4, 2).reshape(warps, deep * 4 * each, 8)
        z = np.stack(sums).reshape(2, 2, warps, 8, 4)  # row half, element, warp, row, column
        z = np.matmul(x, y) + z.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        z = z.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for write, value in zip(writes, z, strict=True):
            write(value, m)

    return run


BUILDERS: dict[str, Builder] = {"ldmatrix": _load, "stmatrix": _store, "mma": _multiply}
