"""Compile a Triton kernel for any target on any machine, and read what came out. No GPU is touched.

What is read is a fact of the machine code; what is predicted from it (`bound`) is no measurement.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swat_flex.inspection.assembly import Instruction, parse_amdgcn, parse_sass
from swat_flex.inspection.loops import Loop, inner_loops
from swat_flex.inspection.occupancy import Occupancy, Resources, occupancy
from swat_flex.inspection.targets import TARGETS, Target, target_named

ALIGNMENT = 16  # bytes or elements; the one divisibility that Triton specialises on


@dataclass(frozen=True, slots=True)
class Inspection:
    """A compiled kernel, read.

    Attributes:
        name: the kernel's.
        target: what it was compiled for.
        warps: warps per block.
        resources: registers, spills, stack and shared memory.
        occupancy: resident blocks and warps of one multiprocessor.
        loops: the innermost loops, in the order of addresses.
        instructions: the whole kernel.
    """

    name: str
    target: Target
    warps: int
    resources: Resources
    occupancy: Occupancy
    loops: tuple[Loop, ...]
    instructions: tuple[Instruction, ...]

    @property
    def has_float64(self) -> bool:
        """Tell whether anything is computed in float64 or converted from or to it."""
        return any(
            i.kind == "float64" or re.search(r"\bF64\b|64H\b|_f64|\bDMMA\b", i.opcode) for i in self.instructions
        )

    @property
    def local_memory_instructions(self) -> tuple[Instruction, ...]:
        """Loads and stores of thread-local memory: spilled registers."""
        return tuple(i for i in self.instructions if i.kind in ("LDL", "STL"))

    @property
    def tensor_core_instructions(self) -> tuple[Instruction, ...]:
        """Matrix instructions: HMMA, HGMMA, UTCHMMA, MFMA and their relatives."""
        return tuple(i for i in self.instructions if i.kind == "tensor core")


def inspect_kernel(
    kernel: Any,
    signature: Mapping[str, str] | Sequence[str] = (),
    constexprs: Mapping[str, Any] | None = None,
    target: str | None = None,
    **options: Any,
) -> Inspection:
    """Read a kernel's machine code, compiling it first unless it is compiled already.

        inspect_kernel(forward_kernel, ["*bf16", "*bf16", "fp32", "i32:16"], {"BLOCK": 128}, "sm_90", num_warps=8)
        inspect_kernel(forward_kernel[grid](...))  # what a launch returns

    Args:
        kernel: a `triton.jit` function, or a compiled kernel (`.asm` and `.metadata`), which needs nothing else.
        signature, constexprs, target, options: see `compile_for`.

    Raises:
        ValueError, TypeError: an argument breaks a rule; the message names the argument, the rule and the value.
    """
    if not hasattr(kernel, "asm"):
        if target is None:
            raise ValueError(f"target: expected one of {', '.join(TARGETS)} to compile a kernel for, got None")
        kernel = compile_for(kernel, signature, constexprs or {}, target, **options)
    metadata = kernel.metadata
    found = _target_of(metadata.target)
    scalar_registers: int | None = None
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        instructions = parse_amdgcn(text)
        names = "TotalNumVgprs", "ScratchSize", "TotalNumSgprs"
        registers, stack, scalar_registers = (_remark(text, name) for name in names)
    else:
        instructions, registers, stack = _read_cubin(kernel.asm["cubin"], metadata.name)
    resources = Resources(
        registers=registers,
        scalar_registers=scalar_registers,
        local_loads=sum(i.kind == "LDL" for i in instructions),
        local_stores=sum(i.kind == "STL" for i in instructions),
        stack=stack,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", 0) or 0,
    )
    return Inspection(
        name=metadata.name,
        target=found,
        warps=metadata.num_warps,
        resources=resources,
        occupancy=occupancy(resources, metadata.num_warps, found),
        loops=inner_loops(instructions),
        instructions=instructions,
    )


def compile_for(
    kernel: Any,
    signature: Mapping[str, str] | Sequence[str],
    constexprs: Mapping[str, Any],
    target: str,
    **options: Any,
) -> Any:
    """Compile a Triton kernel for a target that this machine need not have.

    Args:
        kernel: a `triton.jit` function, possibly under `triton.autotune` or `triton.heuristics`.
        signature: Triton's type of each argument that is not in `constexprs`, by name or in order: "*bf16", "fp32",
            "i32". A pointer is taken to be aligned to 16 bytes, as torch allocates and as a launch would specialise;
            "*bf16:1" takes nothing for granted, and "i32:16" promises a multiple of 16.
        constexprs: values of the compile-time arguments; those with a default may be left out.
        target: one of `TARGETS`, as "sm_90".
        options: Triton's: num_warps, num_stages, maxnreg…

    Returns:
        Triton's compiled kernel, with `.asm` and `.metadata`.

    Raises:
        ValueError, TypeError: an argument breaks a rule.
        RuntimeError: Triton is not installed, or cannot compile the kernel.
    """
    chosen = target_named(target)
    kernel = unwrapped(kernel)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    types, values, aligned = _arguments(kernel, signature, constexprs)
    gpu = GPUTarget(chosen.backend, chosen.arch, chosen.warp_size)
    known = vars(make_backend(gpu).parse_options({}))
    for name in options:
        if name not in known:  # Triton would ignore it
            raise ValueError(f"options: expected names that Triton knows for {target}, got {name!r}")
    attributes = {(i,): [["tt.divisibility", ALIGNMENT]] for i in aligned}
    return triton.compile(ASTSource(kernel, types, values, attributes), target=gpu, options=options)


def unwrapped(kernel: Any) -> Any:
    """Return the `triton.jit` function under `triton.autotune` or `triton.heuristics`.

    Raises:
        TypeError: there is none.
        RuntimeError: Triton is not installed.
    """
    try:
        from triton import JITFunction
    except ImportError as error:
        raise RuntimeError(f"triton: expected to be installed to compile a kernel, got {error}") from error
    while not isinstance(kernel, JITFunction) and hasattr(kernel, "fn"):
        kernel = kernel.fn
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"kernel: expected a triton.jit function, got {type(kernel).__name__}")
    return kernel


def _arguments(
    kernel: Any, signature: Mapping[str, str] | Sequence[str], constexprs: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Types by name, constexpr values by name, and positions of the arguments known to be aligned."""
    names = [parameter.name for parameter in kernel.params]
    for name in constexprs:
        if name not in names:
            raise ValueError(f"constexprs: expected names among {', '.join(names)}, got {name!r}")
    values = {p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default} | dict(constexprs)
    missing = [p.name for p in kernel.params if p.is_constexpr and p.name not in values]
    if missing:
        raise ValueError(f"constexprs: expected a value for {', '.join(missing)}, got {dict(constexprs)}")
    runtime = [name for name in names if name not in values]
    given = dict(signature) if isinstance(signature, Mapping) else dict(zip(runtime, signature, strict=False))
    if set(given) != set(runtime) or len(signature) != len(runtime):
        raise ValueError(f"signature: expected types for {', '.join(runtime) or 'no argument'}, got {signature!r}")
    types, aligned = {}, []
    for position, name in enumerate(names):
        kind, _, divisor = given.get(name, "constexpr").partition(":")
        if divisor not in ("", "1", str(ALIGNMENT)):
            raise ValueError(f"signature: expected no divisor, :1 or :{ALIGNMENT} for {name}, got {given[name]!r}")
        types[name] = kind
        if divisor == str(ALIGNMENT) or (kind.startswith("*") and not divisor):
            aligned.append(position)
    return types, values, aligned


def _target_of(gpu: Any) -> Target:
    """Ours for Triton's description of a target."""
    for target in TARGETS.values():
        if (target.backend, target.arch) == (gpu.backend, gpu.arch):
            return target
    raise ValueError(f"kernel: expected to be compiled for one of {', '.join(TARGETS)}, got {gpu.backend} {gpu.arch}")


def _read_cubin(cubin: bytes, name: str) -> tuple[tuple[Instruction, ...], int, int]:
    """(instructions, registers, stack) by the cuobjdump that Triton's package carries."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-sass", "--dump-resource-usage", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    usage = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+)", done.stdout)
    if done.returncode or usage is None:
        raise RuntimeError(f"cuobjdump: expected a listing of {name}, got status {done.returncode}: {done.stderr}")
    return parse_sass(done.stdout, name), int(usage[1]), int(usage[2])


def _remark(text: str, name: str) -> int:
    """A fact that LLVM writes behind AMD's assembly as a comment."""
    match = re.search(rf"^; {name}: (\d+)", text, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"amdgcn: expected LLVM's remark {name!r}, got none")
    return int(match[1])
