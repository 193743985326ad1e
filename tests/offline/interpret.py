"""Execute what lower.py wrote in the Triton interpreter: `python interpret.py CASE.pt`; prints the results' path.

Inductor's modules run as they are: the kernels on CPU tensors, one program of the grid after another.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import types
from collections.abc import Callable
from pathlib import Path

import generated
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _elementwise(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[tl.tensor], tl.tensor]:
    def run(x: tl.tensor) -> tl.tensor:
        values = function(x.handle.data.astype(np.float32)).astype(np.float32)
        return tl.core.tensor(interpreter.TensorHandle(values, tl.float32), x.type)

    return run


class LibDevice:
    """CUDA's libdevice, as far as the kernels use it."""

    exp, exp2, log, log2, log1p = (
        staticmethod(_elementwise(function)) for function in (np.exp, np.exp2, np.log, np.log2, np.log1p)
    )


def inline_asm(asm: str, constraints: str, args: list[tl.tensor], **_: object) -> tl.tensor:
    """A PTX program of one input, instruction by instruction, in float32."""
    (argument,) = args
    operations = {
        "mul.f32": np.multiply,
        "add.f32": np.add,
        "ex2.approx.ftz.f32": np.exp2,
        "lg2.approx.ftz.f32": np.log2,
        "rcp.approx.ftz.f32": np.reciprocal,
    }
    registers = {"$1": argument.handle.data.astype(np.float32)}

    def read(operand: str) -> np.ndarray | np.float32:
        if operand.startswith("0f"):
            return np.frombuffer(bytes.fromhex(operand[2:]), ">f4").astype(np.float32)[0]
        return registers[operand]

    with np.errstate(over="ignore", divide="ignore"):
        for line in asm.strip("{} ").split(";"):
            operation, _, operands = line.strip().partition(" ")
            if operation in operations:
                target, *sources = (x.strip() for x in operands.split(","))
                registers[target] = np.float32(operations[operation](*map(read, sources)))
            elif operation not in ("", ".reg"):
                raise NotImplementedError(f"asm: {line.strip()}")
    return tl.core.tensor(interpreter.TensorHandle(registers["$0"], tl.float32), argument.type)


def launch(module: types.ModuleType, kernel: object, meta: dict, grid: tuple, arguments: dict) -> None:
    """In Triton's interpreter, which has no inline assembly and no libdevice."""
    module.libdevice = LibDevice
    kernel[grid](**arguments)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    tl.inline_asm_elementwise = inline_asm
    torch.save(generated.run(path, launch), path.with_suffix(".out.pt"))
