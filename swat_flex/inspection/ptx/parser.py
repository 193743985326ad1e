"""PTX text read into basic blocks of instructions."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from swat_flex.inspection.ptx.faults import Fault

_TOKEN = re.compile(
    r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<open>\{)|(?P<close>\})"
    r"|(?P<directive>\.(?:loc|pragma)[^\n;]*;?)|(?P<statement>[^;{]*(?:\{[^{}]*\}[^;{]*)*);)"
)
_STATEMENT = re.compile(r"(?:@(!?)([\w%$]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
_ENDS = ("bra", "ret", "exit", "trap", "bar", "barrier")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        line: of the PTX text, from 1.
        text: the instruction in one line.
        guard: the predicate under which it runs, or None; `negated` if it runs where the predicate is false.
        opcode: with its modifiers, "fma.rn.f32".
        operands: split at commas outside of brackets and braces.
        scope: by name, what a register is called in `Program.registers`.
        source: "file.py:61" of the kernel's source, or None.
    """

    line: int
    text: str
    guard: str | None
    negated: bool
    opcode: str
    operands: tuple[str, ...]
    scope: dict[str, str]
    source: str | None


@dataclass(slots=True)
class Block:
    """Instructions that run one after another; `end` branches, returns or is a barrier, `target` is where it goes."""

    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None
    target: int | None = None


@dataclass(frozen=True, slots=True)
class Parameter:
    """A kernel's parameter: its name, its type ("u64", "f32", "b8") and how many bytes it has."""

    name: str
    kind: str
    size: int


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel.

    Attributes:
        name: of the entry.
        threads: of a block, as `.reqntid` says; 0 where it says nothing.
        parameters: in order.
        registers: type ("b32", "pred") of each register, by a name that no other scope has.
        blocks: execution begins with the first and ends behind the last.
    """

    name: str
    threads: int
    parameters: tuple[Parameter, ...]
    registers: dict[str, str]
    blocks: tuple[Block, ...]


def split(text: str) -> list[str]:
    """Split at commas outside of brackets and braces."""
    found, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append(text[begin:at].strip())
            begin = at + 1
    return [*found, text[begin:].strip()] if text.strip() else []


@functools.lru_cache(maxsize=64)
def parse(ptx: str) -> Program:
    """Read the first entry of a PTX module."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), ptx, flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text)
    head = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text)
    if head is None:
        raise Fault("the text has no entry")
    threads = re.search(r"\.reqntid\s+(\d+)", head[3])
    reader = _Reader(text, head.end())
    reader.read()
    return Program(
        name=head[1],
        threads=int(threads[1]) if threads else 0,
        parameters=tuple(_parameter(p) for p in split(head[2])),
        registers=reader.registers,
        blocks=tuple(reader.blocks),
    )


def _parameter(text: str) -> Parameter:
    kind, name, count = re.fullmatch(r".*?\.([usbf]\d+)\b.*?([\w$]+)(?:\[(\d+)\])?", text, re.DOTALL).groups()  # type: ignore[union-attr]  # the grammar of .param
    return Parameter(name, kind, int(kind[1:]) // 8 * int(count or 1))


class _Reader:
    """The body of a kernel, token by token."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at
        self.line = text.count("\n", 0, at) + 1
        self.registers: dict[str, str] = {}
        self.blocks = [Block()]
        self.scopes: list[dict[str, str]] = [{}]
        self.numbers = [0]  # of the open scopes
        self.opened = 0
        self.source: str | None = None
        self.labels: dict[tuple[str, int], int] = {}
        self.branches: list[tuple[Block, Instruction, tuple[int, ...]]] = []
        self.wanted = set(re.findall(r"\bbra(?:\.uni)?\s+([\w$]+)", text))  # the other labels are for debuggers
        self.files = dict(re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', text))

    def read(self) -> None:
        while self.scopes:
            token = _TOKEN.match(self.text, self.at)
            if token is None:
                raise Fault(f"PTX line {self.line} cannot be read: {self.text[self.at : self.at + 80].strip()!r}")
            self.line += self.text.count("\n", self.at, token.start(token.lastgroup or 0))
            self.at = token.end()
            self._take(token)
            self.line += self.text.count("\n", token.start(token.lastgroup or 0), token.end())
        if self.blocks[-1] == Block():  # behind the last instruction that ends one
            self.blocks.pop()
        for block, instruction, numbers in self.branches:
            places = (self.labels.get((instruction.operands[0], n)) for n in reversed(numbers))
            block.target = next((place for place in places if place is not None), None)
            if block.target is None:
                raise Fault("a branch to a label that is not there").place(instruction)

    def _take(self, token: re.Match[str]) -> None:
        if label := token["label"]:
            if label in self.wanted:
                if self.blocks[-1].instructions:
                    self.blocks.append(Block())
                self.labels[label, self.numbers[-1]] = len(self.blocks) - 1
        elif token["open"]:
            self.opened += 1
            self.scopes.append(dict(self.scopes[-1]))
            self.numbers.append(self.opened)
        elif token["close"]:
            self.scopes.pop()
            self.numbers.pop()
        elif directive := token["directive"]:
            if place := re.match(r"\.loc\s+(\d+)\s+(\d+)", directive):
                self.source = f"{self.files.get(place[1], '?').rpartition('/')[2]}:{place[2]}"
        elif statement := token["statement"].strip():
            if statement.startswith(".reg"):
                self._declare(statement)
            else:
                self._instruction(" ".join(statement.split()))

    def _declare(self, statement: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL).groups()  # type: ignore[union-attr]  # the grammar of .reg
        suffix = "" if len(self.scopes) == 1 else f"@{self.numbers[-1]}"
        for name in split(names):
            many = re.match(r"(%?[\w$]+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.scopes[-1][one] = one + suffix
                self.registers[one + suffix] = kind

    def _instruction(self, text: str) -> None:
        found = _STATEMENT.fullmatch(text)
        if found is None:
            raise Fault(f"PTX line {self.line} cannot be read: {text[:80]!r}")
        negated, guard, opcode, rest = found.groups()
        made = Instruction(
            self.line, text, guard, negated == "!", opcode, tuple(split(rest)), self.scopes[-1], self.source
        )
        if opcode.split(".")[0] in _ENDS and not opcode.startswith("bar.warp"):
            self.blocks[-1].end = made
            if opcode.startswith("bra"):
                self.branches.append((self.blocks[-1], made, tuple(self.numbers)))
            self.blocks.append(Block())
        else:
            self.blocks[-1].instructions.append(made)
