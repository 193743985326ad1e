"""mbarrier: barriers in shared memory that count arrivals, and bytes that tensor copies bring.

What threads may do is what the PTX manual says of `mbarrier`; operations that hand out a state, or take one, are not
known. That an arrival orders a warp's accesses before those of a warp that waits is not modelled: `bar.sync` alone
orders what warps write and read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import Array, Mask
from swat_flex.inspection.ptx.shared import MBARRIER, UNWRITTEN
from swat_flex.inspection.ptx.site import Builder, Site, Step

MOST = (1 << 20) - 1  # arrivals and bytes that an mbarrier can count


@dataclass(slots=True)
class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for, and the copies that bring the bytes.

    Each phase answers its first question with no, as may happen on a GPU: a program that asks once is found out.

    Attributes:
        number: of this phase among all; the last phase's is `before`.
        asked: parity of the phase that was asked for last.
    """

    expected: int
    pending: int
    number: int
    before: int = 0
    bytes: int = 0
    phase: int = 0
    asked: int | None = None
    copies: list[tuple[Array, Array]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return not self.pending and sum(values.size for _, values in self.copies) == self.bytes


def _mbarrier(site: Site) -> Step:
    what = site.need("init", "inval", "arrive", "expect_tx", "try_wait", "test_wait")
    site.kind("b64")
    site.need("shared", "shared:cta")
    if what == "init":
        return _initialise(site)
    if what == "inval":
        return _invalidate(site)
    return _wait(site) if what.endswith("wait") else _arrive(site, what)


def _each(
    site: Site, at: Callable[[Array | None], Array], act: Callable[[int, int], None], becomes: int | None = None
) -> Step:
    """Do something for each lane that runs, at its address, whose bytes become (the place of) something else."""
    machine = site.machine

    def run(m: Mask) -> None:
        lanes = machine.lanes_of(m)
        address = at(lanes)
        machine.shared.use_barrier(address, lanes, becomes)
        for lane, place in zip(lanes.tolist(), address.tolist(), strict=True):
            act(lane, place)

    return run


def _initialise(site: Site) -> Step:
    count, machine = site.source(site.operands[1], "u32"), site.machine

    def act(lane: int, address: int) -> None:
        key, expected = (int(machine.block_of[lane]), address), int(count[lane])
        if key in machine.copies.barriers:
            raise Fault("initialises an mbarrier that is in use", lane=lane, address=address)
        if not 1 <= expected <= MOST:
            raise Fault(f"an mbarrier that expects {expected} arrivals, not 1 to {MOST}", lane=lane, address=address)
        machine.copies.barriers[key] = Barrier(expected, expected, machine.shared.new_phase())

    return _each(site, site.address(site.operands[0]), act, MBARRIER)


def _invalidate(site: Site) -> Step:
    machine = site.machine

    def act(lane: int, address: int) -> None:
        if machine.copies.barrier(lane, address).copies:
            raise Fault("invalidates an mbarrier while bytes are on their way", lane=lane, address=address)
        del machine.copies.barriers[int(machine.block_of[lane]), address]

    return _each(site, site.address(site.operands[0]), act, UNWRITTEN)


def _arrive(site: Site, what: str) -> Step:
    """arrive, which may also expect bytes, and expect_tx, which arrives nowhere."""
    site.take("release", "relaxed")
    site.take("cta")
    arrives, expects = what == "arrive", what == "expect_tx" or site.take("expect_tx") is not None
    operands = site.operands[1:] if arrives else site.operands
    if arrives and site.operands[0] != "_":
        raise Fault("returns a state, which is not known")
    machine = site.machine
    count = site.source(operands[1], "u32") if len(operands) > 1 else machine.constant(1, np.uint32)

    def act(lane: int, address: int) -> None:
        number = int(count[lane])
        machine.copies.arrive(lane, address, (1 if expects else number) * arrives, number * expects)

    return _each(site, site.address(operands[0]), act)


def _wait(site: Site) -> Step:
    site.need("parity")
    site.take("acquire")
    site.take("cta")
    at, parity = site.address(site.operands[1]), site.source(site.operands[2], "u32")
    write, machine = site.sink(site.operands[0], "pred"), site.machine

    def run(m: Mask) -> None:
        lanes = machine.lanes_of(m)
        address, ready = at(lanes), np.zeros(machine.lanes, np.bool_)
        machine.shared.use_barrier(address, lanes)
        keys = machine.block_of[lanes] << 33 | address << 1 | (parity[lanes] & 1)
        for key in np.unique(keys):
            of = lanes[keys == key]
            answer = machine.copies.poll(of, int(key >> 1) & 0xFFFFFFFF, int(key) & 1)
            ready[of] = bool(answer)
            machine.stalled |= answer is None
        write(ready, m)

    return run


BUILDERS: dict[str, Builder] = {"mbarrier": _mbarrier}
