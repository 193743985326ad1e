"""Which unit of a multiprocessor bounds a loop, by counting: a static prediction, not a measurement."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from swat_flex.inspection.assembly import SPECIAL_FUNCTIONS, Instruction
from swat_flex.inspection.loops import Loop
from swat_flex.inspection.targets import Gpu, Target

WARPGROUP = 4  # warps that execute one Hopper tensor-core instruction together

# FP32 operations per lane of one instruction; a packed FF2 does two.
_FLOAT32 = {"FFMA": 1, "FMUL": 1, "FADD": 1, "FF2": 2}

_WARP_MMA = re.compile(r"([HQ])MMA\.168(\d+)\.F32\b(.*)")
_WARPGROUP_MMA = re.compile(r"([HQ])GMMA\.64x(\d+)x(\d+)\.F32\b(.*)")
_BLOCK_MMA = re.compile(r"UTC([HQ])MMA$")
_MATRIX_CORE = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_(f16|bf16|xf32|fp8|bf8)")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a loop can reach if every unit overlaps perfectly with the others and no latency shows.

    Attributes:
        clocks: clocks of one multiprocessor that each unit needs for one iteration of one block. Units without work
            and units whose rate is unknown are absent.
        unknown: units that have work but no known rate, with the reason in words.
        tflops: useful TFLOP/s of the whole GPU, an upper limit; None unless a GPU and the useful work were given.
    """

    clocks: Mapping[str, float]
    unknown: Mapping[str, str]
    tflops: float | None

    @property
    def bound(self) -> str | None:
        """The unit that needs the most clocks; None when no unit has a known rate."""
        return max(self.clocks, key=lambda unit: self.clocks[unit], default=None)


def predict(
    loop: Loop,
    warps: int,
    target: Target,
    *,
    gpu: Gpu | None = None,
    flops: float | None = None,
    bytes_moved: float | None = None,
) -> Prediction:
    """The static bound of a loop that all `warps` warps of a block run.

    For each unit, clocks = count · warps / rate per multiprocessor; the largest is the bound. Shared-memory bandwidth,
    conversions, latency and the code around the loop are not modelled.

    Args:
        loop: the loop, as `inner_loops` finds it.
        warps: warps per block.
        target: where it runs.
        gpu: the product, for TFLOP/s and for the memory bound.
        flops: useful floating-point operations of one iteration of one block.
        bytes_moved: bytes that one iteration of one block moves from and to the GPU's memory.
    """
    rates, counts = target.rates, loop.counts
    lanes = warps * target.warp_size
    work: dict[str, tuple[float, int | None]] = {
        "special functions": (lanes * sum(counts.get(kind, 0) for kind in SPECIAL_FUNCTIONS), rates.special),
        "float32": (lanes * sum(counts.get(kind, 0) * each for kind, each in _FLOAT32.items()), rates.float32),
        "float64": (lanes * counts.get("float64", 0), rates.float64),
        "issue": (warps * len(loop.instructions), rates.issue),
    }
    clocks: dict[str, float] = {}
    unknown: dict[str, str] = {}
    tensor = _tensor_clocks(loop, warps, target)
    if isinstance(tensor, str):
        unknown["tensor cores"] = tensor
    elif tensor:
        clocks["tensor cores"] = tensor
    for unit, (amount, rate) in work.items():
        if amount and rate is None:
            unknown[unit] = f"no published rate for {target.name}"
        elif amount and rate:
            clocks[unit] = amount / rate
    if gpu and bytes_moved:
        clocks["memory"] = bytes_moved * gpu.multiprocessors * gpu.clock / gpu.bandwidth
    tflops = None
    if gpu and flops and clocks:
        tflops = flops * gpu.multiprocessors * gpu.clock / max(clocks.values()) / 1e12
    return Prediction(clocks, unknown, tflops)


def _tensor_clocks(loop: Loop, warps: int, target: Target) -> float | str:
    """Clocks of the tensor cores, or why they are unknown."""
    clocks = 0.0
    for instruction in loop.instructions:
        if instruction.kind == "tensor core":
            work = tensor_work(instruction, warps)
            if work is None:
                return f"{instruction.opcode} is of no shape and format that we recognise"
            operands, flops = work
            if operands not in target.rates.tensor:
                return f"no published rate of {operands} operands for {target.name}"
            clocks += flops / target.rates.tensor[operands]
    return clocks


def tensor_work(instruction: Instruction, warps: int) -> tuple[str, float] | None:
    """(operand format, FLOP of one block of `warps` warps) of a tensor-core instruction; None if not recognised."""
    opcode = instruction.opcode
    if match := _WARP_MMA.match(opcode):  # one warp: 16 × 8 × K
        return _format(match[1], match[3]), 2.0 * 16 * 8 * int(match[2]) * warps
    if match := _WARPGROUP_MMA.match(opcode):  # four warps: 64 × N × K
        return _format(match[1], match[4]), 2.0 * 64 * int(match[2]) * int(match[3]) * warps / WARPGROUP
    if match := _BLOCK_MMA.match(opcode):  # one thread for its block
        return _described(match[1], instruction.operands)
    if match := _MATRIX_CORE.match(opcode):  # one warp: blocks × M × N × K
        rows, columns, depth = (int(size) for size in match.groups()[:3])
        name = {"xf32": "tf32", "fp8": "8-bit", "bf8": "8-bit"}.get(match[5], "16-bit")
        return name, 2.0 * int(match[4] or 1) * rows * columns * depth * warps
    return None


def _format(letter: str, modifiers: str) -> str:
    return "8-bit" if letter == "Q" else "tf32" if "TF32" in modifiers else "16-bit"


def _described(letter: str, operands: str) -> tuple[str, float] | None:
    """From the instruction descriptor (PTX ISA, tcgen05): sums in bits 4-5, operands in 7-9, N/8 in 17-22, M/16 in
    24-28."""
    match = re.search(r"idesc\[(0x[0-9a-f]+)\]", operands)
    if match is None:
        return None
    descriptor = int(match[1], 16)
    if descriptor >> 4 & 3 != 1:  # sums not in float32
        return None
    rows, columns = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
    name = "8-bit" if letter == "Q" else "tf32" if descriptor >> 7 & 7 == 2 else "16-bit"
    return name, 2.0 * rows * columns * {"8-bit": 32, "16-bit": 16, "tf32": 8}[name]
