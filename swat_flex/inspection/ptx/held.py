"""`Held`: registers of wgmma products, which nobody may touch before the wait, nor use in a product without a fence.

PTX manual, wgmma: a product owns its sums and its operands in registers until `wgmma.wait_group` has waited for its
group. `wgmma.fence` must stand before the first product, and between what else writes a register and the product that
uses it; only products that follow each other on the same sums need none.

Two things that LLVM moves behind the fence, and that ptxas sees and puts in order, count as if they stood before it: a
`mov` between registers, which only gives a value another name, and what writes an operand, if a fence stands anywhere
between the last commit and the product.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import Array, Mask
from swat_flex.inspection.ptx.parser import Instruction, Program
from swat_flex.inspection.ptx.site import Site, Step

if TYPE_CHECKING:
    from swat_flex.inspection.ptx.machine import Machine

GROUP = 128  # threads of a warpgroup
_REGISTER = re.compile(r"%[\w$]+")


def _renamed(instruction: Instruction) -> tuple[str, str] | None:
    """Return the registers that a `mov` writes and reads, if that is all it does."""
    names = [instruction.scope.get(operand) for operand in instruction.operands]
    if instruction.opcode.startswith("mov.") and len(names) == 2 and names[0] and names[1]:
        return names[0], names[1]
    return None


def _used(program: Program) -> set[str]:
    """Names of the registers that any product uses, and of those that are moved into such."""
    instructions = [instruction for block in program.blocks for instruction in block.instructions]
    found, new = set[str](), set[str]()
    for instruction in instructions:
        if instruction.opcode.startswith("wgmma.mma_async"):
            for operand in instruction.operands[:2]:
                new |= {instruction.scope[x] for x in Site.vector(operand) if operand.startswith("{")}
    moves = [move for instruction in instructions if new and (move := _renamed(instruction))]
    while new:
        found |= new
        new = {source for to, source in moves if to in new} - found
    return found


class Held:
    """What holds, of `[registers, warpgroups]`: the number of the group of products that a register belongs to, or −1.

    Attributes:
        sums: by which group it is written.
        reads: by which group it is read.
        chain: which sums it is one of, since the last fence; −1 where of none.
        written: whether an instruction wrote it since the last fence; at the beginning all count as written.
        flying: whether any product is in flight.
        begun: of each warpgroup, whether it fenced since it last closed a group of products.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.rows = {name: row for row, name in enumerate(sorted(_used(machine.program)))}
        self.chains: dict[tuple[int, ...], int] = {}
        self.reset()

    def reset(self) -> None:
        shape = len(self.rows), max(1, self.machine.lanes // GROUP)
        self.sums, self.reads, self.chain = (np.full(shape, -1) for _ in range(3))
        self.written, self.begun = np.ones(shape, np.bool_), np.zeros(shape[1], np.bool_)
        self.flying = False

    def rows_of(self, instruction: Instruction, text: str) -> Array:
        """Return the rows of the registers in a text that products use."""
        names = {instruction.scope.get(name) for name in _REGISTER.findall(text)}
        return np.array(sorted(self.rows[name] for name in names if name in self.rows), np.int64)

    def watched(self, instruction: Instruction, step: Step) -> Step:
        """Return the step of an instruction that is no product, which looks at the registers that it touches first."""
        rows = self.rows_of(instruction, instruction.text) if self.rows else ()
        if not len(rows):
            return step
        move, result = _renamed(instruction), instruction.operands[0]
        writes = self.rows_of(instruction, "" if result.startswith("[") else result)
        # Where a register of a product's is moved away, it is only read, and may go on being read.
        kept = writes if move else rows
        everybody = np.arange(self.written.shape[1])

        def run(m: Mask) -> None:
            groups = everybody if m is None else np.flatnonzero(m.reshape(-1, GROUP).any(1))
            if self.flying:
                wrong = self.sums[np.ix_(rows, groups)] >= 0
                self._refuse(wrong, "touches a register that a product in flight writes", groups)
                wrong = self.reads[np.ix_(kept, groups)] >= 0
                self._refuse(wrong, "touches a register that a product in flight reads", groups)
            if move and len(writes):
                of = self.written[self.rows[move[1]], groups]
                self.written[writes[0], groups] = of if m is None else of | self.written[writes[0], groups]
            else:
                self.written[np.ix_(writes, groups)] = True
            step(m)

        return run

    def product(self, groups: Array, sums: Array, reads: Array, number: Array) -> None:
        """Note a product that writes `sums` and reads other registers, in each warpgroup's group of this number."""
        at, chain = np.ix_(sums, groups), self.chains.setdefault(tuple(sums.tolist()), len(self.chains))
        apart = np.ix_(reads, groups)
        what = "uses a register that was written without wgmma.fence since"
        self._refuse(self.written[at], what, groups)
        self._refuse(self.written[apart] & ~self.begun[groups], what, groups)
        other = (self.chain[at] >= 0) & (self.chain[at] != chain)
        self._refuse(other, "adds to a register of another product's sums without wgmma.fence since", groups)
        self._refuse(self.reads[at] >= 0, "writes a register that a product in flight reads", groups)
        self._refuse(self.sums[apart] >= 0, "reads a register that a product in flight writes", groups)
        self.sums[at], self.chain[at] = number, chain
        self.reads[apart], self.flying = number, True

    def fence(self, groups: Array) -> None:
        """Order what these warpgroups did to registers before what their products do to them."""
        self.written[:, groups], self.begun[groups] = False, True
        self.chain[:, groups] = np.where(self.sums[:, groups] < 0, -1, self.chain[:, groups])

    def release(self, limit: Array) -> None:
        """Let go what belongs to groups below each warpgroup's limit."""
        for table in (self.sums, self.reads):
            table[table < limit] = -1
        self.flying = bool((self.sums >= 0).any() or (self.reads >= 0).any())

    def _refuse(self, wrong: Array, what: str, groups: Array) -> None:
        if wrong.any():
            raise Fault(what, lane=int(groups[wrong.any(0).argmax()]) * GROUP)
