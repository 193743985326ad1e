"""wgmma: asynchronous products of a warpgroup, whose operands lie in shared memory or registers.

While a product runs nobody may touch its registers (held.py) nor write what it reads; both end with the wait.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from swat_flex.inspection.ptx.copies import swizzled
from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import Array, Mask
from swat_flex.inspection.ptx.held import GROUP, Held
from swat_flex.inspection.ptx.matrix import halves
from swat_flex.inspection.ptx.site import Builder, Site, Step

if TYPE_CHECKING:
    from swat_flex.inspection.ptx.machine import Machine

_COLUMNS = {f"m64n{n}k16": n for n in range(8, 257, 8)}  # of a product, by its shape
_ROW = (0, 128, 64, 32)  # bytes of a swizzled row, by the descriptor's mode


@dataclass(slots=True)
class _Sums:
    """Registers that products add to, their true values `[warpgroups, 64, N]`, and each warpgroup's last group."""

    registers: list[Array]
    values: Array
    group: Array  # −1 where no product runs


@dataclass(slots=True)
class _Reads:
    """Chunks of shared memory `[warpgroups, n]` that a product reads, and its group in each warpgroup."""

    groups: Array
    number: Array
    chunks: Array


class Products:
    """Products in flight, of all warpgroups that run together."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.held = machine, Held(machine)
        self.reset()

    def reset(self) -> None:
        self.held.reset()
        # groups that each warpgroup has closed
        self.committed = np.zeros(max(1, self.machine.lanes // GROUP), np.int64)
        self.sums: dict[int, _Sums] = {}  # by where the first register lies
        self.reads: list[_Reads] = []

    def start(self, targets: list[Array], groups: Array, product: Array, adds: bool) -> None:
        """Begin products `[groups, 64, N]` into registers, on top of what is there if `adds`."""
        key = targets[0].__array_interface__["data"][0]
        found = self.sums.get(key)
        if found is None:
            total = self.machine.lanes // GROUP
            found = _Sums(targets, np.zeros((total, *product.shape[1:]), np.float32), np.full(total, -1))
            self.sums[key] = found
        if adds:
            fresh = groups[found.group[groups] < 0]
            if len(fresh):
                found.values[fresh] = _gather(targets)[fresh]
            product = product + found.values[groups]
        found.values[groups] = product
        found.group[groups] = self.committed[groups]

    def reading(self, groups: Array, chunks: Array) -> None:
        """Note what a product reads until its group is waited for."""
        np.add.at(self.machine.shared.busy, chunks, 1)
        self.reads.append(_Reads(groups, self.committed[groups], chunks))

    def wait(self, groups: Array, keep: int) -> None:
        """Finish the products of these warpgroups, but for those of the newest `keep` groups."""
        limit = np.full(len(self.committed), -1)
        limit[groups] = self.committed[groups] - keep
        left = []
        for read in self.reads:
            done = read.number < limit[read.groups]
            np.subtract.at(self.machine.shared.busy, read.chunks[done], 1)
            if not done.all():
                left.append(_Reads(read.groups[~done], read.number[~done], read.chunks[~done]))
        self.reads = left
        for sums in self.sums.values():
            ready = np.flatnonzero((sums.group >= 0) & (sums.group < limit))
            if len(ready):
                self._finish(sums, ready)
        self.held.release(limit)

    @staticmethod
    def _finish(sums: _Sums, ready: Array) -> None:
        lanes, n = (ready[:, None] * GROUP + np.arange(GROUP)).reshape(-1), sums.values.shape[2]
        z = sums.values[ready].reshape(-1, 4, 2, 8, n // 8, 4, 2)  # group, warp, row half, row, block, column, element
        z = z.transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        for register, value in zip(sums.registers, z, strict=True):
            register[lanes] = value
        sums.group[ready] = -1

    def finish_all(self) -> None:
        """Refuse to end while a product runs."""
        for sums in self.sums.values():
            if (sums.group >= 0).any():
                raise Fault("ends while products run", lane=int((sums.group >= 0).argmax()) * GROUP)


def _gather(registers: list[Array]) -> Array:
    """Sums from their registers, `[warpgroups, 64, N]`."""
    x = np.stack(registers).reshape(len(registers) // 4, 2, 2, -1, 4, 8, 4)
    return x.transpose(3, 4, 1, 5, 0, 6, 2).reshape(x.shape[3], 64, 2 * len(registers))


@functools.lru_cache(maxsize=256)
def _offsets(outer: int, by_outer: bool, lead: int, stride: int, mode: int) -> Array:
    """Bytes from a matrix's start to its 16-byte chunks, before swizzling.

    Along K (`by_outer` false) a chunk is 8 numbers of one row, `[outer, 2]`; along M or N 8 rows' number of one K,
    `[16, outer / 8]`.
    """
    row = _ROW[mode] or 16
    if by_outer:
        k, n = np.arange(16)[:, None], np.arange(outer // 8)[None, :]
        if mode == 0:
            return k % 8 * 16 + n * stride + k // 8 * lead
        return n % (row // 16) * 16 + k % 8 * row + n // (row // 16) * lead + k // 8 * stride
    n, k = np.arange(outer)[:, None], np.arange(2)[None, :]
    if mode == 0:
        return n % 8 * 16 + n // 8 * stride + k * lead
    return k * 16 + n % 8 * row + n // 8 * stride


def _operand(machine: Machine, descriptor: Array, groups: Array, outer: int, by_outer: bool) -> tuple[Array, Array]:
    """Return 16-bit numbers `[groups, outer, 16]` that descriptors name, and their chunks `[groups, n]`."""
    own = descriptor.reshape(-1, GROUP)[groups]
    lanes = groups * GROUP
    if (own != own[:, :1]).any():
        at = int((own != own[:, :1]).any(1).argmax())
        raise Fault("a descriptor differs within a warpgroup", lane=int(lanes[at]))
    bits = own[:, 0].astype(np.int64)
    if ((bits >> 49) & 7).any():
        raise Fault("a descriptor with a base offset is not known")
    fields = bits & ~np.int64(0x3FFF)
    if (fields != fields[0]).any():
        raise Fault("descriptors differ in more than their address")
    lead, stride, mode = (int(bits[0]) >> 16 & 0x3FFF) << 4, (int(bits[0]) >> 32 & 0x3FFF) << 4, int(bits[0]) >> 62 & 3
    offsets = _offsets(outer, by_outer, lead, stride, mode)
    address = swizzled(((bits & 0x3FFF) << 4)[:, None] + offsets.reshape(-1), _ROW[mode])
    of = np.repeat(lanes, offsets.size)
    chunks = machine.shared.pieces(address.reshape(-1), 16, of).reshape(len(groups), -1)
    found = machine.shared.fetch(chunks, lanes)
    if by_outer:
        found = found.reshape(len(groups), 16, outer // 8, 8).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(found.reshape(len(groups), outer, 16)), chunks


def _product(site: Site) -> Step:
    last, kind = site.kind(), site.kind()
    if site.kind() != "f32" or last != kind or kind not in ("bf16", "f16"):
        raise Fault("is not known for these types")
    shape = site.take(*_COLUMNS)
    if shape is None:
        raise Fault("is not known for this shape")
    n = _COLUMNS[shape]
    names, in_registers = site.vector(site.operands[0]), site.operands[1].startswith("{")
    targets = [site.view(x, "f32") for x in names]
    if len(targets) != n // 2:
        raise Fault(f"expects {n // 2} sums")
    registers = [site.source(x, "b32") for x in site.vector(site.operands[1])] if in_registers else None
    left = None if in_registers else site.source(site.operands[1], "b64")
    right, adds = site.source(site.operands[2], "b64"), site.source(site.operands[3], "pred")
    rest = [int(x) for x in site.operands[4:]]
    if rest[:2] != [1, 1] or len(rest) != (3 if in_registers else 4):
        raise Fault("negates an operand or lacks its layout, which is not known")
    flips = (False, bool(rest[2])) if in_registers else (bool(rest[2]), bool(rest[3]))
    machine, held = site.machine, site.machine.products.held
    sums = held.rows_of(site.instruction, site.operands[0])
    reads = np.setdiff1d(held.rows_of(site.instruction, site.operands[1] if in_registers else ""), sums)

    def run(m: Mask) -> None:
        groups = machine.groups_of(m, GROUP)
        held.product(groups, sums, reads, machine.products.committed[groups])
        if registers is not None:
            x = halves(np.stack(registers), kind).reshape(2, 2, -1, 4, 8, 4, 2)  # K half, row half, group, warp, row, …
            x = x.transpose(2, 3, 1, 4, 0, 5, 6).reshape(-1, 64, 16)[groups]
        elif left is not None:
            a, chunks = _operand(machine, left, groups, 64, flips[0])
            x = halves(a, kind)
            machine.products.reading(groups, chunks)
        b, other = _operand(machine, right, groups, n, flips[1])
        scale = adds.reshape(-1, GROUP)[groups]
        if (scale != scale.flat[0]).any():
            raise Fault("scale-d differs between threads", lane=int(groups[0]) * GROUP)
        machine.products.reading(groups, other)
        machine.products.start(targets, groups, np.matmul(x, halves(b, kind).transpose(0, 2, 1)), bool(scale.flat[0]))

    return run


def _build(site: Site) -> Step:
    what = site.need("mma_async", "fence", "commit_group", "wait_group")
    site.need("sync")
    site.need("aligned")
    machine = site.machine
    if what == "mma_async":
        return _product(site)
    if what == "fence":
        return lambda m: machine.products.held.fence(machine.groups_of(m, GROUP))
    if what == "commit_group":

        def commit(m: Mask) -> None:
            groups = machine.groups_of(m, GROUP)
            machine.products.committed[groups] += 1
            machine.products.held.begun[groups] = False

        return commit
    keep = int(site.operands[0])
    return lambda m: machine.products.wait(machine.groups_of(m, GROUP), keep)


BUILDERS: dict[str, Builder] = {"wgmma": _build}
