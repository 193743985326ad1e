"""`Site`: one instruction of a program and the machine it is built for; what the builders of instructions take."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import RAW, TYPES, Array, Mask, is_integer, width
from swat_flex.inspection.ptx.parser import Instruction, split

if TYPE_CHECKING:
    from swat_flex.inspection.ptx.machine import Machine

Step: TypeAlias = Callable[[Mask], None]
Write: TypeAlias = Callable[[Any, Mask], None]
Builder: TypeAlias = Callable[["Site"], Step]

_WHOLE = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")


class Site:
    """An instruction whose modifiers are taken one by one: what is left over when it is built is an error."""

    def __init__(self, machine: Machine, instruction: Instruction) -> None:
        self.machine, self.instruction = machine, instruction
        self.operands = instruction.operands
        self.name, *self.modifiers = instruction.opcode.replace("::", ":").split(".")

    def take(self, *names: str) -> str | None:
        """Remove and return the first modifier that is among `names`; None if there is none."""
        for modifier in self.modifiers:
            if modifier in names:
                self.modifiers.remove(modifier)
                return modifier
        return None

    def need(self, *names: str) -> str:
        """`take` that must find one."""
        found = self.take(*names)
        if found is None:
            raise Fault(f"expects one of {', '.join(names)}")
        return found

    def kind(self, *known: str) -> str:
        """Remove and return the last modifier, which must be a type, one of `known` if any are named."""
        if not self.modifiers or self.modifiers[-1] not in TYPES:
            raise Fault("expects a type")
        kind = self.modifiers.pop()
        if known and kind not in known:
            raise Fault(f"is not known for {kind}")
        return kind

    def finish(self) -> None:
        """Refuse what nobody took."""
        if self.modifiers:
            raise Fault(f"has modifiers that are not known: {', '.join(self.modifiers)}")

    # operands

    def register(self, text: str) -> Array:
        """Return the array of a register, one element per lane."""
        unique = self.instruction.scope.get(text)
        if unique is None:
            raise Fault(f"names no register: {text}")
        return self.machine.registers[unique]

    def source(self, text: str, kind: str) -> Array:
        """Return what an operand holds, seen as numbers of `kind`; packed types have two elements per lane."""
        unique = self.instruction.scope.get(text)
        x = self.machine.registers[unique] if unique is not None else self._constant(text, kind)
        if x.dtype.itemsize != width(kind) and not (kind == "pred" and x.dtype == np.bool_):
            raise Fault(f"takes {text} as {kind}, a register of {8 * x.dtype.itemsize} bits")
        return x.view(TYPES[kind])

    def _constant(self, text: str, kind: str) -> Array:
        machine, size = self.machine, width(kind)
        if text in machine.special:
            return machine.special[text]
        if _WHOLE.fullmatch(text):
            number = int(text.rstrip("U"), 0)
            if kind == "pred":
                return machine.constant(number != 0, np.bool_)
            return machine.constant(number & ((1 << 8 * size) - 1), RAW[size])
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            bits = np.array(int(text[2:], 16), np.uint32)
            if kind == "f64":
                return machine.constant(float(bits.view(np.float32)), np.float64)
            return machine.constant(int(bits), np.uint32)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return machine.constant(int(text[2:], 16), np.uint64)
        if text in machine.symbols:
            return machine.constant(machine.symbols[text], RAW[size])
        raise Fault(f"has an operand that is not known: {text}")

    def view(self, text: str, kind: str) -> Array:
        """Return a register to write into, seen as numbers of `kind`."""
        x = self.register(text)
        if x.dtype.itemsize != width(kind):
            raise Fault(f"writes {kind} to {text}, a register of {8 * x.dtype.itemsize} bits")
        return x.view(TYPES[kind])

    def sink(self, text: str, kind: str) -> Write:
        """Return what writes values to a register where a mask says so."""
        if text == "_":
            return lambda value, m: None
        to = self.view(text, kind)
        double = kind.endswith("x2")

        def write(value: Any, m: Mask) -> None:
            if m is None:
                to[...] = value
            else:
                np.copyto(to, value, where=np.repeat(m, 2) if double else m, casting="unsafe")

        return write

    def wide_sink(self, text: str, kind: str) -> Write:
        """`sink` to a register that may be wider than `kind`: integers are extended by sign or by zeros."""
        size = width(kind) if text == "_" else self.register(text).itemsize
        if size == width(kind):
            return self.sink(text, kind)
        if size < width(kind) or not is_integer(kind):
            raise Fault(f"writes {kind} to {text}, a register of {8 * size} bits")
        return self.sink(text, f"{'s' if kind[0] == 's' else 'u'}{8 * size}")

    def computed(self, function: Callable[..., Any], kind: str, *of: str) -> Step:
        """Return the step that writes `function` of the operands behind the first, of types `of`, to the first."""
        given = [self.source(text, kind) for text, kind in zip(self.operands[1:], of, strict=False)]
        write = self.sink(self.operands[0], kind)
        if not isinstance(function, np.ufunc) or self.operands[0] == "_":
            return lambda m: write(function(*given), m)
        to = self.view(self.operands[0], kind)

        def run(m: Mask) -> None:
            if m is None:
                function(*given, out=to)
            else:
                write(function(*given), m)

        return run

    def predicate(self, text: str) -> Callable[[], Array]:
        """Return what reads a predicate, which "!" negates."""
        p = self.source(text.lstrip("!"), "pred")
        return (lambda: ~p) if text.startswith("!") else (lambda: p)

    def address(self, text: str) -> Callable[[Array | None], Array]:
        """Return what gives the addresses (int64) of some lanes, or of all for None."""
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise Fault(f"has an address that is not known: {text}")
        offset = int(found[2], 0) if found[2] else 0
        base = self.machine.symbols.get(found[1])
        if base is not None:
            fixed = self.machine.constant(base + offset, np.int64)
            return lambda lanes: fixed if lanes is None else fixed[lanes]
        register = self.register(found[1])
        return lambda lanes: (register if lanes is None else register[lanes]).astype(np.int64) + offset

    @staticmethod
    def vector(text: str) -> list[str]:
        """Split "{a, b}" into its elements; anything else is a vector of one."""
        return split(text[1:-1]) if text.startswith("{") else [text]


def plain(function: Callable[..., Any], count: int, *rest: str, known: tuple[str, ...] = ()) -> Builder:
    """Return what builds an instruction without modifiers: a function of `count` operands of its type, then others.

    Args:
        rest: types of the others.
        known: the types that it has; any if none is named.
    """

    def build(site: Site) -> Step:
        kind = site.kind(*known)
        return site.computed(function, kind, *[kind] * count, *rest)

    return build
