"""Execute what lower.py wrote in the Triton interpreter: `python interpret.py CASE.pt`; prints the results' path.

Inductor's modules run as they are: the kernels on CPU tensors, one program of the grid after another.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import contextlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

PATH = Path(sys.argv[1])


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


class Kernel:
    """One generated kernel, called as Inductor's launcher is."""

    def __init__(self, name: str, source: str) -> None:
        source = re.sub(r"@triton_heuristics\.\w+\(", "META = dict(", source)
        source = source.replace("triton_helpers.set_driver_to_gpu()", "")
        source = source.replace("tl.inline_asm_elementwise(", "inline_asm(")
        path = PATH.with_name(f"kernel_{name[:80]}.py")
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        module.inline_asm = inline_asm
        spec.loader.exec_module(module)
        module.libdevice = LibDevice
        self.kernel, self.meta = getattr(module, name), module.META

    def run(self, *args: object, stream: object = None) -> None:
        if self.meta["inductor_meta"]["grid_type"] == "FixedGrid":
            self.kernel[tuple(int(x) for x in args[-3:])](*args[:-3])
            return
        hints, block = self.meta["size_hints"], {"x": 64, "y": 16, "r0_": 64}
        sizes = [x for x in args if isinstance(x, int)]
        axes = [axis for axis in hints if not axis.startswith("r")]
        grid = tuple(triton.cdiv(size, block[axis]) for axis, size in zip(axes, sizes, strict=False))
        blocks = {f"{axis.upper()}BLOCK": block[axis] for axis in axes}
        if any(axis.startswith("r") for axis in hints) and "persistent" not in self.meta.get("heuristics", ""):
            blocks |= {f"{axis.upper()}BLOCK": block[axis] for axis in hints if axis.startswith("r")}
        names = self.kernel.arg_names
        self.kernel[grid](*args, **{name: size for name, size in blocks.items() if name in names})


class Compiler:
    """Inductor's `async_compile`, without the compiler."""

    def triton(self, name: str, source: str, device_str: str | None = None) -> Kernel:
        return Kernel(name, source)

    def wait(self, scope: object) -> None:
        pass


def load(source: str) -> Callable[[list[torch.Tensor]], tuple[torch.Tensor | None, ...]]:
    source = source.replace("async_compile = AsyncCompile()", "async_compile = Compiler()")
    source = re.sub(r"from torch\._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = id", source)
    source = re.sub(r"empty_strided_cuda = .*", "empty_strided_cuda = on_cpu", source)

    def on_cpu(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    scope = {"Compiler": Compiler, "on_cpu": on_cpu, "__name__": "module", "__file__": str(PATH)}
    exec(compile(source, str(PATH), "exec"), scope)
    return scope["call"]


def main() -> None:
    torch.cuda._DeviceGuard = lambda index: contextlib.nullcontext()
    torch.cuda.set_device = lambda index: None
    case = torch.load(PATH, weights_only=False)
    values = dict(case["inputs"])
    for module in case["modules"]:
        outputs = load(module["source"])([values[name] for name in module["inputs"]])
        values |= {name: x for name, x in zip(module["outputs"], outputs, strict=True) if name is not None}
    results = {name: values[of] for name, of in case["gradients"].items()} | {"out": values[case["out"]]}
    torch.save(results, PATH.with_suffix(".out.pt"))


main()
