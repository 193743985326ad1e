"""`Fault`: something that a compiled program must not do, and where it does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swat_flex.inspection.ptx.formats import Array
    from swat_flex.inspection.ptx.parser import Instruction


class Fault(Exception):
    """An access out of bounds, a race, an unwritten byte, an instruction or modifier that is not known, …

    Attributes:
        what: the rule that is broken, in words.
        lane: which of the threads that the machine runs together; `place` turns it into block and thread.
        address: of the access, or None.
        kernel: whose code it is, or None where nobody said.
        instruction: the one that breaks the rule, or None before `place`.
        block: (x, y, z) of the thread block, or None where every thread is concerned.
        thread: its number in the block, or None likewise.
    """

    def __init__(self, what: str, *, lane: int | None = None, address: int | None = None) -> None:
        super().__init__(what)
        self.what, self.lane, self.address = what, lane, address
        self.kernel: str | None = None
        self.instruction: Instruction | None = None
        self.block: tuple[int, int, int] | None = None
        self.thread: int | None = None

    def place(
        self, instruction: Instruction, block: tuple[int, int, int] | None = None, thread: int | None = None
    ) -> Fault:
        """Name the instruction and the thread, where they are not named yet; return the fault itself."""
        if self.instruction is None:
            self.instruction, self.block, self.thread = instruction, block, thread
        return self

    def __str__(self) -> str:
        words = self.what if self.kernel is None else f"{self.kernel}: {self.what}"
        if self.address is not None:
            words += f", address {self.address:#x}"
        if self.thread is not None:
            words += f", thread {self.thread} of block {self.block}"
        if self.instruction is not None:
            source = f", {self.instruction.source}" if self.instruction.source else ""
            words += f"\n  PTX line {self.instruction.line}{source}: {self.instruction.text[:160]}"
        return words


def refuse(wrong: Array, what: str, lanes: Array, address: Array) -> None:
    """Raise a fault for the first of some lanes' accesses that is wrong, if any is."""
    if wrong.any():
        at = int(wrong.argmax())
        raise Fault(what, lane=int(lanes[at]), address=int(address[at]))
