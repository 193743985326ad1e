"""Registers of compiled PTX that are read and never written: they hold what other code has left there."""

from __future__ import annotations

import functools
import re

_NO_CODE = re.compile(r"//[^\n]*|^\s*\$?\w+:|^\s*\.(?!reg\b)[^\n]*", re.MULTILINE)  # comments, labels, directives
_DECLARED = re.compile(r"\.reg\s+\.\w+\s+(%\w+?)(?:<\d+>)?\s*$")
_INSTRUCTION = re.compile(r"(?:@!?(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_REGISTER = re.compile(r"%[a-z]+\d*")
# Two registers put into a wider one, taken out of it, and arithmetic on its halves apart.
_PACK = re.compile(r"mov\.b\d+\s+(%\w+),\s*\{([^}]*)\}")
_UNPACK = re.compile(r"mov\.b\d+\s+\{([^}]*)\},")
_BY_HALVES = re.compile(r"(?:add|sub|mul|fma)\.(?:\w+\.)*f32x2\s+(%\w+),")
# Instructions without a destination; so are those whose first operand is an address.
_NO_RESULT = re.compile(r"(st|red|cp|bar|barrier|bra|stmatrix|fence|membar|prefetch|setmaxnreg|nanosleep)\b")


@functools.lru_cache(maxsize=64)
def undefined_registers(ptx: str) -> tuple[str, ...]:
    """Names of the registers of a PTX module that some instruction reads and none writes, in the order of first use.

    Triton pads with such registers what a packed piece of assembly takes beyond the elements that a thread holds.
    Names that a piece of assembly declares for itself, which carry no percent sign, are not looked at; nor is a half
    that LLVM leaves open in a wider register and that nobody uses.
    """
    prefixes: set[str] = set()  # "%r" of "%r<12>"; special registers such as %tid.x are declared nowhere
    read: dict[str, list[str]] = {}  # by name the instructions that read it
    written: set[str] = set()
    for statement in _NO_CODE.sub("", ptx).split(";"):
        if declared := _DECLARED.search(statement):
            prefixes.add(declared[1])
        elif instruction := _INSTRUCTION.match(statement.lstrip("(){} \t\n")):
            guard, opcode, operands = instruction.groups()
            if not operands.startswith("[") and not _NO_RESULT.match(opcode):
                result = re.match(r"\{[^}]*\}|[^,]*", operands)
                assert result is not None  # the second form matches anything
                written.update(_REGISTER.findall(result[0]))
                operands = operands[result.end() :]
            for name in _REGISTER.findall(f"{guard} {operands}"):
                read.setdefault(name, []).append(instruction[0].strip())
    unwritten = [name for name in read if name not in written and name.rstrip("0123456789") in prefixes]
    return tuple(name for name in unwritten if not all(_is_filling(name, where, read) for where in read[name]))


def _is_filling(name: str, instruction: str, read: dict[str, list[str]]) -> bool:
    """Tell whether the instruction puts a register into a half of a wider one that nobody uses."""
    packed = _PACK.match(instruction)
    halves = [] if packed is None else [at for at, half in enumerate(packed[2].split(",")) if half.strip() == name]
    return packed is not None and all(_is_dropped(packed[1], at, read, set()) for at in halves)


def _is_dropped(wide: str, half: int, read: dict[str, list[str]], seen: set[str]) -> bool:
    """Tell whether all readers of a wide register throw a half away, or compute each half from the same half alone."""
    seen.add(wide)
    for reader in read.get(wide, ()):
        if apart := _UNPACK.match(reader):
            dropped = apart[1].split(",")[half].strip() == "_"
        elif by_halves := _BY_HALVES.match(reader):
            dropped = by_halves[1] in seen or _is_dropped(by_halves[1], half, read, seen)
        else:
            dropped = False
        if not dropped:
            return False
    return True
