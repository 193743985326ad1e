"""`Machine`: runs a program's thread blocks, several at a time, every register a numpy array over all their threads.

Basic blocks run under a mask of threads, the earliest in the text first, so that threads whose ways part meet again. A
thread block passes a barrier when each of its threads is at one or has returned. What is modelled is what instructions
mean and what they forbid; time, caches and the rounding inside of tensor cores are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from swat_flex.inspection.ptx import arithmetic, bits, convert, copies, loads, matrix, mbarrier, warps, wgmma
from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import TYPES, Array, Mask
from swat_flex.inspection.ptx.memory import Global
from swat_flex.inspection.ptx.parser import Instruction, Parameter, Program
from swat_flex.inspection.ptx.shared import WINDOW, Shared
from swat_flex.inspection.ptx.site import Site, Step

LANES = 2048  # threads that run together: numpy's cost per call is spread over them while registers fit into caches
POISON = 0x7FC0DEAD  # what a register holds before it is written: NaN in float32 and, cut to 16 bits, in bfloat16
_BUILDERS = {
    name: builder
    for room in (arithmetic, bits, convert, copies, loads, matrix, mbarrier, warps, wgmma)
    for name, builder in room.BUILDERS.items()
}


class Machine:
    """A program for blocks of `program.threads`, with `shared` bytes of dynamic shared memory per block.

    Attributes:
        blocks, threads, warps, lanes: thread blocks that run together, threads and warps of each, threads of all.
        ran: numbers of the basic blocks that ran.
        steps: instructions carried out, each for all threads that ran it together.
    """

    def __init__(self, program: Program, shared: int, memory: Global, grid: Sequence[int]) -> None:
        if program.threads == 0 or program.threads % 32:
            raise Fault(f"expects .reqntid with whole warps, got {program.threads} threads")
        self.program, self.memory, self.threads = program, memory, program.threads
        x, y, z = (*grid, 1, 1)[:3]
        self.grid, count = (x, y, z), x * y * z
        together = max(1, min(count, LANES // self.threads))
        self.blocks = -(-count // max(1, -(-count // together)))
        self.warps, self.lanes = self.threads // 32, self.blocks * self.threads
        self.everyone = np.arange(self.lanes)
        self.block_of, self.thread_of = np.divmod(self.everyone, self.threads)
        self.warp_of = self.thread_of // 32
        self.shared = Shared(self, shared)
        self.registers = {name: np.zeros(self.lanes, TYPES[kind]) for name, kind in program.registers.items()}
        self.special = self._special()
        self.symbols = {"global_smem": WINDOW}
        self.arguments: dict[str, Array] = {}
        self.copies, self.products = copies.Copies(self), wgmma.Products(self)
        self.ran: set[int] = set()
        self.steps = 0
        self.stalled = False  # the last basic block polled in vain for something that another thread must do
        self._constants: dict[tuple[Any, Any], Array] = {}
        self._built: dict[int, list[Step]] = {}

    def _special(self) -> dict[str, Array]:
        found: dict[str, Any] = {"%laneid": self.thread_of % 32, "%warpid": self.warp_of, "%tid.x": self.thread_of}
        found |= dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z"), 0)
        found |= {"%ntid.x": self.threads, "%ntid.y": 1, "%ntid.z": 1}
        found |= {f"%nctaid.{axis}": n for axis, n in zip("xyz", self.grid, strict=True)}
        return {name: np.full(self.lanes, x, np.uint32) for name, x in found.items()}

    def give(self, parameter: Parameter, value: float) -> None:
        """Set a parameter of the kernel; of one that is a descriptor `value` is the address."""
        if parameter.size > 8:
            self.symbols[parameter.name] = int(value)
        else:
            self.arguments[parameter.name] = np.array([value]).astype(TYPES[parameter.kind])

    def constant(self, value: float, dtype: Any) -> Array:
        """Return one number for every lane."""
        key = value, dtype
        if key not in self._constants:
            made = np.full(self.lanes, value, dtype)
            made.flags.writeable = False
            self._constants[key] = made
        return self._constants[key]

    def spread(self, values: Array, m: Mask) -> Array:
        """Return values of the lanes that run in an array over all lanes."""
        if m is None:
            return values
        whole = np.zeros(self.lanes, values.dtype)
        whole[m] = values
        return whole

    def lanes_of(self, m: Mask) -> Array:
        """Return the numbers of the lanes that run."""
        return self.everyone if m is None else np.flatnonzero(m)

    def groups_of(self, m: Mask, size: int = 32) -> Array:
        """Return the numbers of the groups of `size` neighbouring lanes that run, warps by default: all run or none."""
        if m is None:
            return np.arange(self.lanes // size)
        by_group = m.reshape(-1, size)
        some, whole = by_group.any(1), by_group.all(1)
        if (some != whole).any():
            group = int((some != whole).argmax())
            raise Fault(f"runs without all {size} threads that belong together", lane=group * size)
        return np.flatnonzero(whole)

    def run(self) -> None:
        """Run every thread block of the grid."""
        x, y, z = self.grid
        with np.errstate(all="ignore"):
            for first in range(0, x * y * z, self.blocks):
                number = first + self.block_of
                for axis, value in zip("xyz", (number % x, number // x % y, number // (x * y)), strict=True):
                    self.special[f"%ctaid.{axis}"][:] = value
                self._reset()
                self._run(number < x * y * z)

    def _reset(self) -> None:
        for x in self.registers.values():
            x[...] = True if x.dtype == np.bool_ else np.array(POISON, np.uint64).astype(f"u{x.itemsize}").view(x.dtype)
        self.shared = Shared(self, self.shared.limit)
        self.copies.reset()
        self.products.reset()

    def _run(self, alive: Array) -> None:
        """Run the blocks of which `alive` names the threads."""
        waiting, parked = {0: alive}, dict[int, Array]()
        self._alive = alive.copy()
        stalled: set[int] = set()
        while waiting:
            free = [at for at in waiting if at not in stalled]
            if not free:
                at = min(waiting)
                fault = Fault("waits for something that no thread will do")
                raise fault.place(self.program.blocks[at].instructions[-1], *self._place(int(waiting[at].argmax())))
            at = min(free)
            mask = waiting.pop(at)
            self.stalled = False
            self._execute(at, None if mask.all() else mask)
            if self.stalled:
                stalled.add(at)
            else:
                stalled.clear()
            self._follow(at, mask, waiting, parked)
            if parked:
                self._release(waiting, parked)
        self.products.finish_all()

    def _place(self, lane: int) -> tuple[tuple[int, int, int], int]:
        x, y, z = (int(self.special[f"%ctaid.{axis}"][lane]) for axis in "xyz")
        return (x, y, z), int(self.thread_of[lane])

    def _execute(self, at: int, m: Mask) -> None:
        """Run one basic block's instructions."""
        steps = self._built.get(at)
        if steps is None:
            steps = self._built[at] = [self._build(i) for i in self.program.blocks[at].instructions]
            self.ran.add(at)
        number = 0
        try:
            for number, step in enumerate(steps):  # noqa: B007  # it names the instruction in a fault
                step(m)
        except Fault as fault:
            lane = int(self.lanes_of(m)[0]) if fault.lane is None else fault.lane
            raise fault.place(self.program.blocks[at].instructions[number], *self._place(lane)) from None
        self.steps += len(steps)

    def _build(self, instruction: Instruction) -> Step:
        site = Site(self, instruction)
        try:
            builder = _BUILDERS.get(site.name)
            if builder is None:
                raise Fault("is an instruction that is not known")
            step = builder(site)
            site.finish()
            if site.name != "wgmma":
                step = self.products.held.watched(instruction, step)
            return step if instruction.guard is None else self._guarded(site, step)
        except Fault as fault:
            raise fault.place(instruction) from None

    def _guarded(self, site: Site, step: Step) -> Step:
        p, negated = site.source(site.instruction.guard or "", "pred"), site.instruction.negated

        def run(m: Mask) -> None:
            on = ~p if negated else p.copy()
            if m is not None:
                on &= m
            if on.all():
                step(None)
            elif on.any():
                step(on)

        return run

    def _follow(self, at: int, mask: Array, waiting: dict[int, Array], parked: dict[int, Array]) -> None:
        """Send the threads that ran a basic block where they go from there."""
        block = self.program.blocks[at]
        end, taken = block.end, mask
        if end is None:
            self._send(at + 1, mask, waiting)
            return
        if end.guard is not None:
            p = self.registers[end.scope[end.guard]]
            taken = mask & (~p if end.negated else p)
        name = end.opcode.split(".")[0]
        if name == "bra" and block.target is not None and end.opcode in ("bra", "bra.uni"):
            self._send(block.target, taken, waiting)
        elif name in ("ret", "exit"):
            self._alive &= ~taken
        elif end.opcode in ("bar.sync", "barrier.sync", "barrier.sync.aligned") and end.operands == ("0",):
            self._send(at + 1, taken, parked)
        else:
            raise Fault("is an instruction that is not known").place(end)
        self._send(at + 1, mask & ~taken, waiting)

    def _send(self, to: int, who: Array, where: dict[int, Array]) -> None:
        if not who.any():
            return
        if to == len(self.program.blocks):
            self._alive &= ~who
        else:
            where[to] = where[to] | who if to in where else who

    def _release(self, waiting: dict[int, Array], parked: dict[int, Array]) -> None:
        """Let those thread blocks go on whose threads are all at a barrier."""
        there = np.zeros(self.lanes, np.bool_)
        for who in parked.values():
            there |= who
        met = (there | ~self._alive).reshape(self.blocks, -1).all(1) & there.reshape(self.blocks, -1).any(1)
        if not met.any():
            return
        self.shared.epoch[met] += 1
        free = np.repeat(met, self.threads)
        for at in list(parked):
            who = parked.pop(at)
            self._send(at, who & free, waiting)
            self._send(at, who & ~free, parked)
