"""Registers of compiled PTX that are read and never written: they hold what other code has left there."""

from __future__ import annotations

import functools
import re

_NO_CODE = re.compile(r"//[^\n]*|^\s*\$?\w+:|^\s*\.(?!reg\b)[^\n]*", re.MULTILINE)  # comments, labels, directives
_DECLARED = re.compile(r"\.reg\s+\.\w+\s+(%\w+?)(?:<\d+>)?\s*$")
_INSTRUCTION = re.compile(r"(?:@!?(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_REGISTER = re.compile(r"%[a-z]+\d*")
# Instructions without a destination; so are those whose first operand is an address.
_NO_RESULT = re.compile(r"(st|red|cp|bar|barrier|bra|stmatrix|fence|membar|prefetch|setmaxnreg|nanosleep)\b")


@functools.lru_cache(maxsize=64)
def undefined_registers(ptx: str) -> tuple[str, ...]:
    """Names of the registers of a PTX module that some instruction reads and none writes, in the order of first use.

    Triton pads with such registers what a packed piece of assembly takes beyond the elements that a thread holds.
    Names that a piece of assembly declares for itself, which carry no percent sign, are not looked at.
    """
    prefixes: set[str] = set()  # "%r" of "%r<12>"; special registers such as %tid.x are declared nowhere
    read: dict[str, None] = {}
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
            read.update(dict.fromkeys(_REGISTER.findall(f"{guard} {operands}")))
    return tuple(name for name in read if name not in written and name.rstrip("0123456789") in prefixes)
