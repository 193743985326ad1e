"""Run the modules that Inductor generated, as lower.py wrote them: each kernel's launch is handed to a function."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import types
from collections.abc import Callable
from pathlib import Path

import torch
import triton

# launch(the kernel's module, kernel, its settings, grid, arguments by name)
Launch = Callable[[types.ModuleType, triton.JITFunction, dict, tuple, dict], None]


class Kernel:
    """One generated kernel, called as Inductor's launcher is."""

    def __init__(self, name: str, source: str, folder: Path, launch: Launch) -> None:
        source = re.sub(r"@triton_heuristics\.\w+\(", "META = dict(", source)
        source = source.replace("triton_helpers.set_driver_to_gpu()", "")
        path = folder / f"kernel_{name[:80]}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.kernel, self.meta, self.launch = getattr(self.module, name), self.module.META, launch

    def run(self, *args: object, stream: object = None) -> None:
        names = self.kernel.arg_names
        if self.meta["inductor_meta"]["grid_type"] == "FixedGrid":
            grid, blocks, args = tuple(int(x) for x in args[-3:]), {}, args[:-3]
        else:
            hints, block = self.meta["size_hints"], {"x": 64, "y": 16, "r0_": 64}
            sizes = [x for x in args if isinstance(x, int)]
            axes = [axis for axis in hints if not axis.startswith("r")]
            grid = tuple(triton.cdiv(size, block[axis]) for axis, size in zip(axes, sizes, strict=False))
            blocks = {f"{axis.upper()}BLOCK": block[axis] for axis in hints}
        given = dict(zip(names, args, strict=False)) | {name: size for name, size in blocks.items() if name in names}
        self.launch(self.module, self.kernel, self.meta, grid, given)


def run(path: Path, launch: Launch) -> dict[str, torch.Tensor]:
    """Run the modules of a case on the CPU; the output and the gradients by name."""

    class Compiler:
        """Inductor's `async_compile`, without the compiler."""

        def triton(self, name: str, source: str, device_str: str | None = None) -> Kernel:
            return Kernel(name, source, path.parent, launch)

        def wait(self, scope: object) -> None:
            pass

    torch.cuda._DeviceGuard = lambda index: contextlib.nullcontext()
    torch.cuda.set_device = lambda index: None
    case = torch.load(path, weights_only=False)
    values = dict(case["inputs"])
    for module in case["modules"]:
        call = _load(module["source"], path, Compiler)
        outputs = call([values[name] for name in module["inputs"]])
        values |= {name: x for name, x in zip(module["outputs"], outputs, strict=True) if name is not None}
    return {name: values[of] for name, of in case["gradients"].items()} | {"out": values[case["out"]]}


def _load(source: str, path: Path, compiler: type) -> Callable[[list[torch.Tensor]], tuple[torch.Tensor | None, ...]]:
    source = source.replace("async_compile = AsyncCompile()", "async_compile = Compiler()")
    source = re.sub(r"from torch\._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = id", source)
    source = re.sub(r"empty_strided_cuda = .*", "empty_strided_cuda = on_cpu", source)

    def on_cpu(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty_strided(size, stride, dtype=dtype)
        return made.fill_(float("nan")) if dtype.is_floating_point else made

    scope = {"Compiler": compiler, "on_cpu": on_cpu, "__name__": "module", "__file__": str(path)}
    exec(compile(source, str(path), "exec"), scope)
    return scope["call"]
