"""Run a Triton kernel's compiled code on this machine's CPU, whatever GPU it was compiled for.

Nothing here says how long a GPU would take. What a run shows is that the machine code computes what it should, and
breaks no rule that the hardware has: see `swat_flex.inspection.ptx`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swat_flex.inspection.kernel import unwrapped
from swat_flex.inspection.registers import undefined_registers

if TYPE_CHECKING:
    from swat_flex.inspection.ptx import Global, Machine

# What can be executed, and the bytes of shared memory that a block may have there (CUDA C++ Programming Guide).
EXECUTABLE = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_120": 101376}
_SWIZZLES = (0, 32, 64, 128)  # bytes, by Triton's number


@dataclass(frozen=True, slots=True)
class Execution:
    """What a run shows, besides the tensors that it wrote.

    Attributes:
        writes: how often each element of each tensor among the arguments was written, uint8, in the tensor's shape;
            the tensors of a tuple are "name.0", "name.1", …; parts of an element that differ count as 0.
        undefined: registers that some instruction reads and none writes; they begin as NaN.
        instructions: how many the text has.
        missed: line of each instruction in the text that never ran, and its place in the source ("file.py:61") or "".
    """

    writes: Mapping[str, Tensor]
    undefined: tuple[str, ...]
    instructions: int
    missed: Mapping[int, str]


def execute(
    kernel: Any, target: str, grid: Sequence[int], arguments: Mapping[str, Any], **options: Any
) -> Execution:  # fmt: skip
    """Run a kernel on tensors of the CPU, which it reads and writes.

        execute(scale_kernel, "sm_90", (4,), {"x": x, "out": out, "n": 1000, "scale": 2.0, "B": 256}, num_warps=4)

    Args:
        kernel: a `triton.jit` function, compiled as a launch with these arguments would compile it, or a kernel that is
            compiled already (`.asm`, `.metadata` and `.src`).
        target: "sm_80", "sm_86", "sm_89", "sm_90" or "sm_120"; a compiled kernel must be for it.
        grid: thread blocks along x, y and z.
        arguments: by name: tensors, numbers, None, tuples of them, tensor descriptors; of a function all of them, of a
            compiled kernel at least those that it takes at run time.
        options: Triton's: num_warps, num_stages…; of a function only.

    Raises:
        ValueError, TypeError: an argument breaks a rule; the message names the argument, the rule and the value.
        RuntimeError: numpy is missing.
        swat_flex.inspection.Fault: the code does what it must not do; names instruction, thread, address, source line.
    """
    if target not in EXECUTABLE:
        raise ValueError(f"target: expected one of {', '.join(EXECUTABLE)}, got {target!r}")
    try:
        import numpy  # noqa: F401  # said here once, for everything below
    except ImportError as error:
        raise RuntimeError(
            f'numpy: expected to be installed to execute a kernel: pip install "swat_flex[emulate]", got {error}'
        ) from error
    from swat_flex.inspection.ptx import Fault, Global, Machine, parse

    if not hasattr(kernel, "asm"):
        kernel = compile_launch(kernel, target, arguments, **options)
    elif options:
        raise ValueError(f"options: expected none for a compiled kernel, got {', '.join(options)}")
    check_compiled(kernel, target)
    program = parse(kernel.asm["ptx"])
    memory, values = Global(), list(_runtime_values(kernel, arguments))
    tensors = _Tensors(memory, values)
    try:
        machine = Machine(program, kernel.metadata.shared, memory, grid)
        _pass(machine, tensors, values, iter(kernel.metadata.tensordesc_meta or ()))
        machine.run()
    except Fault as fault:
        fault.kernel = program.name
        raise
    skipped = [b for at, b in enumerate(program.blocks) if at not in machine.ran]
    return Execution(
        writes=tensors.writes(),
        undefined=undefined_registers(kernel.asm["ptx"]),
        instructions=sum(len(block.instructions) for block in program.blocks),
        missed={i.line: i.source or "" for block in skipped for i in block.instructions},
    )


def compile_launch(kernel: Any, target: str, arguments: Mapping[str, Any], **options: Any) -> Any:
    """Compile a `triton.jit` function as a launch with these arguments on that target would, down to PTX.

    What ptxas would make of it is left out: half of the time, and nothing that is executed here.

    Raises:
        TypeError: the kernel is no `triton.jit` function.
        RuntimeError: Triton is not installed.
    """
    kernel = unwrapped(kernel)
    with _pretending(int(target.removeprefix("sm_"))):
        return kernel.run(grid=(1, 1, 1), warmup=True, **arguments, **options)


@contextmanager
def _pretending(capability: int) -> Iterator[None]:
    """Answer what Triton asks of a driver before it compiles, and stop it at PTX."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    def stop(*stages: Any) -> tuple[str, str] | None:
        if not stages:
            return "PTX alone", "PTX alone"  # part of the key by which Triton keeps what it compiled
        stages[1]["cubin"] = lambda ptx, metadata: b"not compiled beyond PTX"
        return None

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> str:
            return f"sm_{capability}, without a GPU"  # Triton keeps compiled kernels by device

        def get_current_stream(self, device: str) -> int:
            return 0

    before, hook = driver._active, knobs.runtime.add_stages_inspection_hook
    driver.set_active(Driver())
    knobs.runtime.add_stages_inspection_hook = stop
    try:
        yield
    finally:
        driver._active, knobs.runtime.add_stages_inspection_hook = before, hook


def check_compiled(kernel: Any, target: str) -> None:
    """Raise ValueError if a compiled kernel is for something else, or would not fit there."""
    found = kernel.metadata.target
    if "ptx" not in kernel.asm or f"sm_{found.arch}" != target:
        raise ValueError(f"kernel: expected to be compiled for {target}, got {found.backend} {found.arch}")
    if getattr(kernel.metadata, "num_ctas", 1) != 1 or getattr(kernel.metadata, "global_scratch_size", 0):
        raise ValueError("kernel: expected no clusters and no global scratch memory, which are not modelled")
    if kernel.metadata.shared > EXECUTABLE[target]:
        raise ValueError(
            f"kernel: expected at most {EXECUTABLE[target]} bytes of shared memory, got {kernel.metadata.shared}"
        )


def _runtime_values(kernel: Any, arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each run-time argument, tuples flattened."""
    for name, kind in kernel.src.signature.items():
        if kind != "constexpr" and name not in arguments:
            raise ValueError(f"arguments: expected a value for {name}, got {', '.join(arguments)}")
        yield from _flattened(name, kind, arguments.get(name))


def _flattened(name: str, kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(kind, tuple):
        if not isinstance(value, tuple) or len(value) != len(kind):
            raise ValueError(f"arguments: expected {len(kind)} values for {name}, got {value!r}")
        for number, (part, of) in enumerate(zip(value, kind, strict=True)):
            yield from _flattened(f"{name}.{number}", of, part)
    elif kind != "constexpr":
        yield name, value


def _is_descriptor(value: Any) -> bool:
    return hasattr(value, "block_shape")


class _Tensors:
    """The tensors among the arguments, each storage one region of memory."""

    def __init__(self, memory: Global, values: list[tuple[str, Any]]) -> None:
        self.memory = memory
        found = ((name, value.base if _is_descriptor(value) else value) for name, value in values)
        self.named = {name: value for name, value in found if isinstance(value, Tensor)}
        self.regions: dict[int, int] = {}  # number of the region, by where its storage lies
        for name, x in self.named.items():
            if x.device.type != "cpu":
                raise ValueError(f"arguments: expected tensors on the CPU, got {name} on {x.device}")

    def address(self, x: Tensor) -> int:
        """Return the address of a tensor's first element."""
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.regions:
            sharing = {n: t for n, t in self.named.items() if t.untyped_storage().data_ptr() == storage.data_ptr()}
            members = torch.zeros(storage.nbytes(), dtype=torch.bool)
            for tensor in sharing.values():
                _elements(members, tensor).fill_(True)
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self.memory.add(" or ".join(sharing), data, None if members.all() else members.numpy())
            self.regions[storage.data_ptr()] = len(self.memory.regions) - 1
        number = self.regions[storage.data_ptr()]
        return self.memory.address_of(number) + int(x.storage_offset()) * x.element_size()

    def writes(self) -> dict[str, Tensor]:
        found = {}
        for name, x in self.named.items():
            if (number := self.regions.get(x.untyped_storage().data_ptr())) is not None:
                parts = _elements(torch.from_numpy(self.memory.regions[number].writes), x)
                least, most = parts.amin(-1), parts.amax(-1)
                found[name] = torch.where(least == most, most, 0)
        return found


def _elements(data: Tensor, x: Tensor) -> Tensor:
    """Return what bytes say of each element of x: `[*x.shape, bytes]`, a view."""
    size = x.element_size()
    strides = [n * size for n in x.stride()]
    return data.as_strided((*x.shape, size), (*strides, 1), x.storage_offset() * size)


def _pass(machine: Machine, tensors: _Tensors, values: list[tuple[str, Any]], described: Iterator[Any]) -> None:
    """Give a program its parameters: what a launch would pass, then two pointers to scratch memory, null."""
    from swat_flex.inspection.ptx import TensorMap

    passed: list[Any] = []
    for name, value in values:
        if isinstance(value, Tensor):
            passed.append(tensors.address(value))
        elif _is_descriptor(value):
            form, size = next(described), value.base.element_size()
            box = tuple(form["block_size"])
            strides = tuple(n * size for n in value.strides)
            map_ = TensorMap(
                tensors.address(value.base), tuple(value.shape), strides, box, size, _SWIZZLES[form["swizzle"]]
            )
            passed += [machine.memory.describe(map_), *value.shape, *value.strides]
        elif value is None or isinstance(value, (bool, int, float)):
            passed.append(0 if value is None else value)
        else:
            raise TypeError(f"arguments: expected a tensor, a number or None for {name}, got {type(value).__name__}")
    missing = len(machine.program.parameters) - len(passed)
    if not 0 <= missing <= 2:
        raise ValueError(f"arguments: expected {len(machine.program.parameters)} values, got {len(passed)}")
    for parameter, value in zip(machine.program.parameters, [*passed, *[0] * missing], strict=True):
        machine.give(parameter, value)
