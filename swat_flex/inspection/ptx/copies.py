"""Asynchronous copies into shared memory: cp.async with its groups, and tensor copies that an mbarrier waits for.

Bytes land as late as the program allows: when a thread waits for them. Until then they may be neither read nor written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import Array, Mask
from swat_flex.inspection.ptx.mbarrier import MOST, Barrier
from swat_flex.inspection.ptx.memory import TensorMap
from swat_flex.inspection.ptx.parser import split
from swat_flex.inspection.ptx.site import Builder, Site, Step

if TYPE_CHECKING:
    from swat_flex.inspection.ptx.machine import Machine


@dataclass(slots=True)
class _Copy:
    """A cp.async of several lanes: where to, what, and the number of the group that each lane put it into."""

    lanes: Array
    pieces: Array
    values: Array
    group: Array


class Copies:
    """Copies on their way, of all thread blocks that run together."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.reset()

    def reset(self) -> None:
        self.flying: list[_Copy] = []
        self.committed = np.zeros(self.machine.lanes, np.int64)  # groups that each lane has closed
        self.barriers: dict[tuple[int, int], Barrier] = {}  # by thread block and address

    def start(self, lanes: Array, to: Array, values: Array) -> None:
        pieces = self.machine.shared.pieces(to, values.shape[1], lanes)
        self.machine.shared.announce(pieces, values.shape[1], lanes)
        self.flying.append(_Copy(lanes, pieces, values, self.committed[lanes]))

    def wait(self, m: Mask, keep: int | None) -> None:
        """Land the groups of the lanes that run, but for the newest `keep`; None lands also what is in no group."""
        on = np.ones(self.machine.lanes, np.bool_) if m is None else m
        left = []
        for copy in self.flying:
            done = on[copy.lanes]
            if keep is not None:
                done = done & (copy.group < self.committed[copy.lanes] - keep)
            if done.any():
                self.machine.shared.land(copy.pieces[done], copy.values[done], copy.lanes[done])
            if not done.all():
                left.append(_Copy(*(x[~done] for x in (copy.lanes, copy.pieces, copy.values, copy.group))))
        self.flying = left

    def barrier(self, lane: int, address: int) -> Barrier:
        key = int(self.machine.block_of[lane]), address
        if key not in self.barriers:
            raise Fault("no mbarrier was initialised there", lane=lane, address=address)
        return self.barriers[key]

    def bring(self, lane: int, of: TensorMap, first: list[int], to: int, barrier: int) -> None:
        """Start the copy of a box whose first element has these coordinates, outermost first; 0 outside the tensor."""
        axes = [np.arange(n) + start for n, start in zip(of.box, first, strict=True)]
        index = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
        inside = ((index >= 0) & (index < of.shape)).all(1)
        values = np.zeros((len(index), of.itemsize), np.uint8)
        if inside.any():
            address = of.address + (index * of.strides).sum(1)
            values[inside] = self.machine.memory.read(address[inside], of.itemsize, np.full(inside.sum(), lane))
        if to % 128:
            raise Fault("a tensor copy to an address that is no multiple of 128", lane=lane, address=to)
        row = max(of.swizzle, 16)
        if of.swizzle and of.box[-1] * of.itemsize > row:
            raise Fault(f"a box wider than the {row} bytes of its swizzle", lane=lane)
        chunk = swizzled(to + 16 * np.arange(values.size // 16), of.swizzle)
        lanes = np.full(len(chunk), lane)
        pieces = self.machine.shared.pieces(chunk, 16, lanes)
        self.machine.shared.announce(pieces, 16, lanes)
        self.machine.shared.check_fenced(pieces, lanes, "a tensor copy overwrites")
        self.barrier(lane, barrier).copies.append((pieces, values.reshape(-1, 16)))

    def arrive(self, lane: int, address: int, arrivals: int, expected: int) -> None:
        """Count arrivals, and bytes that the phase is to wait for; it is over at once if it waits for no more."""
        found = self.barrier(lane, address)
        found.pending -= arrivals
        found.bytes += expected
        if found.pending < 0:
            raise Fault("arrives more often than the mbarrier expects", lane=lane, address=address)
        if found.bytes > MOST:
            raise Fault(f"an mbarrier that expects {found.bytes} bytes, more than it can count", lane=lane,
                        address=address)  # fmt: skip
        if found.over and not found.copies:
            self._turn(found)

    def _turn(self, found: Barrier) -> None:
        """Begin the next phase."""
        found.copies, found.bytes, found.pending, found.phase = [], 0, found.expected, found.phase ^ 1
        found.before, found.number = found.number, self.machine.shared.new_phase()

    def poll(self, lanes: Array, address: int, parity: int) -> bool | None:
        """Tell lanes of a block whether the phase of that parity is over: its bytes land now; None if it cannot be."""
        found = self.barrier(int(lanes[0]), address)
        if found.phase == parity and not found.over:
            return None
        if found.asked != parity:
            found.asked = parity
            return False
        if found.phase == parity:
            for pieces, values in found.copies:
                self.machine.shared.bring(pieces, values, found.number)
            self._turn(found)
        self.machine.shared.acquire(found.before, lanes)
        return True


def swizzled(address: Array, row: int) -> Array:
    """Permute the 16-byte pieces of rows of 32, 64 or 128 bytes by the number of the row; 0 leaves them."""
    moved: Array = address ^ ((address >> 3) & {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}[row])
    return moved


def _copy(site: Site) -> Step:
    site.need("async")
    machine = site.machine
    if site.take("commit_group"):

        def commit(m: Mask) -> None:
            machine.copies.committed[machine.lanes_of(m)] += 1

        return commit
    if site.take("wait_group"):
        keep = int(site.operands[0], 0)
        return lambda m: machine.copies.wait(m, keep)
    if site.take("wait_all"):
        return lambda m: machine.copies.wait(m, None)
    if site.take("bulk"):
        return _tensor_copy(site)
    return _plain_copy(site)


def _plain_copy(site: Site) -> Step:
    level = site.need("cg", "ca")
    site.need("shared", "shared:cta")
    site.need("global")
    site.take("L2:cache_hint", "L2:128B", "L2:256B")
    size = int(site.operands[2], 0)
    if size not in ((16,) if level == "cg" else (4, 8, 16)):
        raise Fault(f"copies {size} bytes")
    to, of = site.address(site.operands[0]), site.address(site.operands[1])
    machine = site.machine
    given = site.source(site.operands[3], "u32") if len(site.operands) > 3 else machine.constant(size, np.uint32)

    def run(m: Mask) -> None:
        lanes = machine.lanes_of(m)
        count = given[lanes]
        if (count > size).any():
            raise Fault(f"reads more than it copies, {int(count.max())} bytes", lane=int(lanes[count.argmax()]))
        values, source = np.zeros((len(lanes), size), np.uint8), of(lanes)
        for n in np.unique(count[count > 0]):  # the rest of the copy is zeros
            on = count == n
            if n & (n - 1):
                raise Fault(f"reads {int(n)} bytes, which is not known", lane=int(lanes[on.argmax()]))
            values[on, : int(n)] = machine.memory.read(source[on], int(n), lanes[on])
        machine.copies.start(lanes, to(lanes), values)

    return run


def _tensor_copy(site: Site) -> Step:
    site.need("tensor")
    rank = int(site.need("1d", "2d", "3d", "4d", "5d")[0])
    site.need("shared:cta", "shared:cluster")
    site.need("global")
    site.need("mbarrier:complete_tx:bytes")
    to, barrier = site.address(site.operands[0]), site.address(site.operands[2])
    found = re.fullmatch(r"\[\s*(%\w+)\s*,\s*\{(.*)\}\s*\]", site.operands[1])
    if found is None or len(split(found[2])) != rank:
        raise Fault("has coordinates that are not known")
    where, coordinates = site.source(found[1], "b64"), [site.source(x, "s32") for x in split(found[2])]
    machine = site.machine

    def run(m: Mask) -> None:
        lanes = machine.lanes_of(m)
        for lane, target, waiter in zip(lanes.tolist(), to(lanes).tolist(), barrier(lanes).tolist(), strict=True):
            first = [int(x[lane]) for x in reversed(coordinates)]
            machine.copies.bring(lane, machine.memory.map_at(int(where[lane])), first, target, waiter)

    return run


BUILDERS: dict[str, Builder] = {"cp": _copy}
