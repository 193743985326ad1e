"""What a program's text alone shows: registers that nothing writes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from swat_flex.inspection.ptx.parser import Instruction, Program

_NAME = re.compile(r"%?[A-Za-z_$][\w$]*")
_NO_RESULT = ("st", "cp", "red", "bar", "bra", "stmatrix", "fence", "membar", "wgmma", "mbarrier")


def _results(instruction: Instruction) -> list[str]:
    """Names of the registers that an instruction writes, as its scope knows them."""
    name = instruction.opcode.split(".")[0]
    writes = name not in _NO_RESULT or instruction.opcode.startswith(("wgmma.mma_async", "mbarrier.try_wait"))
    if not writes or not instruction.operands or instruction.operands[0].startswith("["):
        return []
    return _registers(instruction, instruction.operands[0])


def _registers(instruction: Instruction, text: str) -> list[str]:
    return [instruction.scope[x] for x in _NAME.findall(text) if x in instruction.scope]


def _instructions(program: Program) -> Iterator[Instruction]:
    for block in program.blocks:
        yield from block.instructions
        if block.end is not None:
            yield block.end


def undefined(program: Program) -> dict[str, Instruction]:
    """Registers that some instruction reads and none writes, each with the first that reads it."""
    written: set[str] = set()
    read: dict[str, Instruction] = {}
    for instruction in _instructions(program):
        results = _results(instruction)
        written.update(results)
        for text in instruction.operands[1 if results else 0 :]:
            for name in _registers(instruction, text):
                read.setdefault(name, instruction)
        if instruction.guard is not None:
            read.setdefault(instruction.scope[instruction.guard], instruction)
    return {name: instruction for name, instruction in read.items() if name not in written}
