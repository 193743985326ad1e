"""Asynchronous copies into shared memory: cp.async with its groups, and tensor copies that an mbarrier waits for.

Bytes land as late as the program allows: when a thread waits for them. Until then they may be neither read nor written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import Array, Mask
from swat_flex.inspection.ptx.memory import TensorMap
from swat_flex.inspection.ptx.parser import split
from swat_flex.inspection.ptx.site import Site, Step

if TYPE_CHECKING:
    from swat_flex.inspection.ptx.machine import Machine


@dataclass(slots=True)
class _Copy:
    """A cp.async of several lanes: where to, what, and the number of the group that each lane put it into."""

    lanes: Array
    pieces: Array
    values: Array
    group: Array


@dataclass(slots=True)
class _Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for, and the copies that bring the bytes.

    The first thread that asks is told to ask again, as may happen on a GPU: a program that asks once is found out.
    """

    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0
    asked: bool = False
    copies: list[tuple[Array, Array, Array]] = field(default_factory=list)


class Copies:
    """Copies on their way, of all thread blocks that run together."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.reset()

    def reset(self) -> None:
        self.flying: list[_Copy] = []
        self.committed = np.zeros(self.machine.lanes, np.int64)  # groups that each lane has closed
        self.barriers: dict[tuple[int, int], _Barrier] = {}  # by thread block and address

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
            if done.all():
                self.machine.shared.land(copy.pieces, copy.values, copy.lanes)
            elif done.any():
                self.machine.shared.land(copy.pieces[done], copy.values[done], copy.lanes[done])
                left.append(_Copy(*(x[~done] for x in (copy.lanes, copy.pieces, copy.values, copy.group))))
            else:
                left.append(copy)
        self.flying = left

    def barrier(self, lane: int, address: int) -> _Barrier:
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
        self.barrier(lane, barrier).copies.append((pieces, values.reshape(-1, 16), lanes))

    def poll(self, lane: int, address: int, parity: int) -> bool | None:
        """Tell whether the phase of that parity is over: its bytes land now if they can; None if only others end it."""
        found = self.barrier(lane, address)
        if found.phase == parity:
            if found.pending or sum(values.size for _, values, _ in found.copies) != found.bytes:
                return None
            if not found.asked:
                found.asked = True
                return False
            for pieces, values, lanes in found.copies:
                self.machine.shared.land(pieces, values, lanes, fence=False)
            found.copies, found.bytes, found.pending, found.phase = [], 0, found.expected, found.phase ^ 1
            found.asked = False
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


def _mbarrier(site: Site) -> Step:
    what = site.need("init", "inval", "arrive", "try_wait")
    if site.kind() != "b64":
        raise Fault("is known for b64 alone")
    site.need("shared", "shared:cta")
    return {"init": _initialise, "inval": _invalidate, "arrive": _arrive, "try_wait": _try_wait}[what](site)


def _each(
    site: Site, at: Callable[[Array | None], Array], act: Callable[[int, int], None], *, changes: bool = True
) -> Step:
    """Do something for each lane that runs, at its address; `changes` if it makes or ends the mbarrier."""
    machine = site.machine

    def run(m: Mask) -> None:
        lanes = machine.lanes_of(m)
        address = at(lanes)
        machine.shared.use_barrier(address, lanes, changes=changes)
        for lane, place in zip(lanes.tolist(), address.tolist(), strict=True):
            act(lane, place)

    return run


def _initialise(site: Site) -> Step:
    count, machine = site.source(site.operands[1], "u32"), site.machine

    def act(lane: int, address: int) -> None:
        key = int(machine.block_of[lane]), address
        if key in machine.copies.barriers:
            raise Fault("initialises an mbarrier that is in use", lane=lane, address=address)
        machine.copies.barriers[key] = _Barrier(int(count[lane]), int(count[lane]))

    return _each(site, site.address(site.operands[0]), act)


def _invalidate(site: Site) -> Step:
    machine = site.machine

    def act(lane: int, address: int) -> None:
        if machine.copies.barrier(lane, address).copies:
            raise Fault("invalidates an mbarrier while bytes are on their way", lane=lane, address=address)
        del machine.copies.barriers[int(machine.block_of[lane]), address]

    return _each(site, site.address(site.operands[0]), act)


def _arrive(site: Site) -> Step:
    expects = site.take("expect_tx") is not None
    if site.operands[0] != "_":
        raise Fault("returns a state, which is not known")
    count, machine = site.source(site.operands[2], "u32") if expects else None, site.machine

    def act(lane: int, address: int) -> None:
        found = machine.copies.barrier(lane, address)
        found.pending -= 1
        found.bytes += int(count[lane]) if count is not None else 0
        if found.pending < 0:
            raise Fault("arrives more often than the mbarrier expects", lane=lane, address=address)

    return _each(site, site.address(site.operands[1]), act, changes=False)


def _try_wait(site: Site) -> Step:
    site.need("parity")
    at, parity = site.address(site.operands[1]), site.source(site.operands[2], "u32")
    write, machine = site.sink(site.operands[0], "pred"), site.machine

    def run(m: Mask) -> None:
        lanes = machine.lanes_of(m)
        address, ready = at(lanes), np.zeros(machine.lanes, np.bool_)
        machine.shared.use_barrier(address, lanes, changes=False)
        keys = machine.block_of[lanes] << 33 | address << 1 | (parity[lanes] & 1)
        for key in np.unique(keys):
            of = lanes[keys == key]
            answer = machine.copies.poll(int(of[0]), int(key >> 1) & 0xFFFFFFFF, int(key) & 1)
            ready[of] = bool(answer)
            machine.stalled |= answer is None
        write(ready, m)

    return run


BUILDERS: dict[str, Callable[[Site], Step]] = {"cp": _copy, "mbarrier": _mbarrier}
