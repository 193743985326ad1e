"""Machine code as text, read into instructions: NVIDIA's SASS and AMD's assembly."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a warp.

    Attributes:
        address: byte offset in the function (SASS), or position among the instructions (AMD).
        opcode: with its modifiers, "MUFU.EX2" or "v_exp_f32_e32".
        operands: the text behind it. A Blackwell tensor-core instruction names its shape by a register; where the
            code sets that register to a constant, the constant stands here in its place.
        kind: instruction class, one of `KINDS`.
        target: address that it may jump to.
        falls_through: whether the next instruction may follow.
    """

    address: int
    opcode: str
    operands: str
    kind: str
    target: int | None = None
    falls_through: bool = True


# Instruction class: the opcodes of SASS, those of AMD. The first that matches at the beginning counts.
_CLASSES = (
    ("tensor core", r"(UTC)?[HIQODB]G?MMA\b", r"v_s?mf(ma|mac)_"),
    ("EX2", r"MUFU\.EX2", r"v_exp_(f32|f16|bf16)"),
    ("RCP", r"MUFU\.RCP(?!64)", r"v_rcp_(iflag_)?f(32|16)"),
    ("LG2", r"MUFU\.LG2", r"v_log_f(32|16)"),
    ("TANH", r"MUFU\.TANH", r"v_tanh_"),
    ("other MUFU", r"MUFU", r"v_(rsq|sqrt|sin|cos)_f(32|16)"),
    ("float64", r"D(ADD|MUL|FMA|SETP|MNMX)\b", r"v_(?!cvt)\w+_f64"),
    ("FF2", r"F(FMA|MUL|ADD)2\b", r"v_pk_(fma|mul|add)_f32"),
    ("FFMA", r"FFMA", r"v_(fma|fmac|mac|mad|fmaak|fmamk)_f32"),
    ("FMUL", r"FMUL", r"v_mul_(legacy_)?f32"),
    ("FADD", r"FADD", r"v_(add|sub|subrev)_f32"),
    ("min/max", r"(FMNMX|HMNMX)", r"v_(pk_)?(min|max|minimum|maximum|med)3?_\w*f(16|32)"),
    ("conversion", r"(F2F|F2FP|F2I|F2IP|I2F|I2FP|I2I|I2IP|FRND)\b", r"v_cvt_"),
    ("half", r"H(ADD|MUL|FMA)2", r"v_(pk_)?(add|mul|fma|sub|fmac|mac)_f16"),
    (
        "predicate",
        r"U?([IFH]SETP2?|FSET|FSEL|SEL|PLOP3|PSETP|P2R|R2P|VOTEU?|FCHK|ELECT)\b|HSETP2",
        r"[vs]_cmp|v_cndmask|s_cselect",
    ),
    ("LDGSTS", r"LDGSTS", r"(global|buffer)_load_lds"),
    ("TMA", r"(UTMA|UBLK)", r"tensor_load"),
    ("LDG", r"LD(G|\b)(?!DEPBAR)", r"(global|buffer|flat)_load"),
    ("STG", r"ST(G|\b)", r"(global|buffer|flat)_store"),
    ("LDS", r"LDSM?\b", r"ds_(read|load)"),
    ("STS", r"STSM?\b", r"ds_(write|store)"),
    ("LDL", r"LDL", r"scratch_load"),
    ("STL", r"STL", r"scratch_store"),
    ("tensor memory", r"(LDTM|STTM|UTCCP|UTCATOMSWS)", r"(?!)"),
    ("atomic", r"(RED|REDG|REDS|REDAS|ATOM|ATOMG|ATOMS)\b", r"\w+_atomic_|ds_(add|inc|dec|cmpst|wrxchg)"),
    ("shuffle", r"(SHFL|REDUX|CREDUX|MOVM)", r"ds_(b?permute|swizzle)|v_permlane"),
    (
        "barrier",
        r"(BAR|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|SYNCS|WARPGROUP|WARPSYNC|UTCBAR|ARRIVES|ERRBAR|CCTL|NANOSLEEP)\b",
        r"s_(barrier|waitcnt|sleep)|buffer_(inv|wbl2)",
    ),
    ("constant", r"(LDC|LDCU|ULDC)\b", r"s_(load|buffer_load)"),
    (
        "move",
        r"U?(MOV|PRMT|CS2R|S2R|S2UR|R2UR)\b|IMAD\.MOV",
        r"[vs]_(mov|cmov|perm_|readfirstlane|readlane|writelane|swap)|v_accvgpr",
    ),
    (
        "control",
        r"(BRA|BRX|JMP|EXIT|CALL|RET|BSSY|BSYNC|BREAK|BPT|NOP|YIELD)\b",
        r"s_(c?branch|endpgm|nop|setprio|setpc)",
    ),
    ("integer", r"U?(I|LEA|LOP|SHF|SGXT|BMSK|POPC|FLO|BREV|VIADD|VIMNMX|VABSDIFF)", r"[vs]_"),
)
KINDS = (*(name for name, _, _ in _CLASSES), "other")
SPECIAL_FUNCTIONS = ("EX2", "RCP", "LG2", "TANH", "other MUFU")
_SASS_CLASSES = tuple((name, re.compile(sass)) for name, sass, _ in _CLASSES)
_AMD_CLASSES = tuple((name, re.compile(amd)) for name, _, amd in _CLASSES)

# Some versions of cuobjdump put scheduling notes behind the operands: "BRA 0x40  &req={2} ?trans5;".
_SASS_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*(?:(?<=\s)[&?][^;]*)?;", re.MULTILINE
)
_SASS_FUNCTION = re.compile(r"^\s*Function : (\S+)\s*$", re.MULTILINE)
_SASS_ENDS = re.compile(r"(EXIT|RET|BRX|JMX|JMP)\b")
_IDESC = re.compile(r"idesc\[(UR\d+)\]")
_AMD_LINE = re.compile(r"\s+([a-z]+_[a-z0-9_]+)(?:\s+([^;]*))?")
_AMD_LABEL = re.compile(r"(\.?\w+):")


def parse_sass(text: str, function: str | None = None) -> tuple[Instruction, ...]:
    """The instructions of one function in the output of `cuobjdump -sass`: the first, or the one named."""
    instructions = []
    constants: dict[str, str] = {}  # by uniform register, where the last instruction that wrote it moved one there
    for line in _SASS_LINE.finditer(_function(text, function)):
        address, predicate, opcode, operands = line.groups()
        operands = _IDESC.sub(lambda found: f"idesc[{constants.get(found[1], found[1])}]", operands)
        if operands.startswith("UR"):
            register, _, value = operands.partition(", ")
            constants[register] = value if opcode == "UMOV" and predicate is None else register
        target, falls_through = None, True
        if opcode.split(".")[0] == "BRA":
            condition, _, destination = operands.rpartition(" ")  # "@P0 BRA 0x40", "BRA.U !UP0, 0x40"
            target = int(destination, 16)
            falls_through = bool(predicate or condition)
        elif _SASS_ENDS.match(opcode):
            falls_through = predicate is not None
        kind = _kind(opcode, _SASS_CLASSES)
        instructions.append(Instruction(int(address, 16), opcode, operands, kind, target, falls_through))
    return tuple(instructions)


def parse_amdgcn(text: str) -> tuple[Instruction, ...]:
    """The instructions of the first function in AMD's assembly text."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.partition(".Lfunc_end")[0].splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _AMD_LINE.match(line):
            found.append((instruction[1], (instruction[2] or "").strip()))
    instructions = []
    for address, (opcode, operands) in enumerate(found):
        target = labels.get(operands) if opcode.startswith(("s_branch", "s_cbranch")) else None
        falls_through = opcode not in ("s_branch", "s_endpgm", "s_setpc_b64")
        kind = _kind(opcode, _AMD_CLASSES)
        instructions.append(Instruction(address, opcode, operands, kind, target, falls_through))
    return tuple(instructions)


def _function(text: str, name: str | None) -> str:
    """The part of a listing that belongs to one function."""
    head, *parts = _SASS_FUNCTION.split(text)  # what stands before the first, then names and listings in turn
    listings = dict(zip(parts[::2], parts[1::2], strict=True)) or {"": head}
    if name is None:
        return next(iter(listings.values()))
    if name not in listings:
        raise ValueError(f"function: expected one of {', '.join(listings)}, got {name!r}")
    return listings[name]


def _kind(opcode: str, classes: tuple[tuple[str, re.Pattern[str]], ...]) -> str:
    return next((name for name, pattern in classes if pattern.match(opcode)), "other")
