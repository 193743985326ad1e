"""The innermost loops of a function, found in its control flow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swat_flex.inspection.assembly import KINDS, Instruction

# A loop of these alone computes nothing: it polls a barrier, or waits for tensor memory.
_BOOKKEEPING = {"barrier", "tensor memory", "control", "predicate", "move", "integer", "constant"}
_POLLED = {"barrier", "tensor memory"}


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop.

    Attributes:
        start: address of its first instruction.
        end: address of its last jump back.
        instructions: the body in the order of addresses, code placed out of line included.
    """

    start: int
    end: int
    instructions: tuple[Instruction, ...]

    @property
    def counts(self) -> Mapping[str, int]:
        """Instructions of one warp in one iteration, by class, without the classes that do not occur."""
        found = Counter(instruction.kind for instruction in self.instructions)
        return {kind: found[kind] for kind in KINDS if found[kind]}


def inner_loops(instructions: Sequence[Instruction]) -> tuple[Loop, ...]:
    """The loops that hold no other loop, in the order of addresses; loops that only wait do not count.

    A back edge goes to a block that dominates its origin; an address lower than the jump's own is not enough, because
    compilers place rarely run code at the end of a function and jump back from there.
    """
    if not instructions:
        return ()
    blocks = _blocks(instructions)
    successors = _successors(instructions, blocks)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(successors):
        for successor in following:
            predecessors[successor].append(block)
    reachable = _reached([0], successors)
    bodies: dict[int, set[int]] = {}
    tails: dict[int, int] = {}
    for header in reachable:
        before = _reached([0], successors, without=header)
        back = [block for block in predecessors[header] if block in reachable - before]
        if back:
            bodies[header] = {header} | _reached(back, predecessors, without=header)
            tails[header] = max(instructions[blocks[block].stop - 1].address for block in back)
    code = {
        header: tuple(instructions[i] for block in sorted(body) for i in blocks[block])
        for header, body in bodies.items()
    }
    working = {header for header in bodies if not _waits(code[header])}
    return tuple(
        Loop(instructions[blocks[header].start].address, tails[header], code[header])
        for header in sorted(working)
        if not any(other != header and other in bodies[header] for other in working)
    )


def _waits(body: Sequence[Instruction]) -> bool:
    kinds = {instruction.kind for instruction in body}
    return kinds <= _BOOKKEEPING and bool(kinds & _POLLED)


def _blocks(instructions: Sequence[Instruction]) -> list[range]:
    """Basic blocks as ranges of positions."""
    positions = {instruction.address: position for position, instruction in enumerate(instructions)}
    starts = {0}
    for position, instruction in enumerate(instructions):
        if instruction.target is not None or not instruction.falls_through:
            starts.add(position + 1)
        if instruction.target in positions:
            starts.add(positions[instruction.target])
    starts -= {len(instructions)}
    ordered = sorted(starts)
    return [range(start, stop) for start, stop in zip(ordered, [*ordered[1:], len(instructions)], strict=True)]


def _successors(instructions: Sequence[Instruction], blocks: Sequence[range]) -> list[list[int]]:
    """The blocks that may follow each block. A BSYNC is taken to fall through: its threads meet right behind it."""
    at = {instructions[block.start].address: number for number, block in enumerate(blocks)}
    successors = []
    for number, block in enumerate(blocks):
        last = instructions[block.stop - 1]
        following = {number + 1} if last.falls_through and number + 1 < len(blocks) else set()
        if last.target in at:
            following.add(at[last.target])
        successors.append(sorted(following))
    return successors


def _reached(start: Sequence[int], following: Sequence[Sequence[int]], without: int | None = None) -> set[int]:
    """The blocks that are reached from some, themselves included, by ways that do not touch the block `without`."""
    found: set[int] = set()
    front = list(start)
    while front:
        block = front.pop()
        if block != without and block not in found:
            found.add(block)
            front += following[block]
    return found
