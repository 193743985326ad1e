"""Compile one of Inductor's Triton kernels to SASS with Triton's own ptxas, and count what it is made of."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.M)
MATMUL = re.compile(r"^(HGMMA|HMMA|WGMMA|DMMA|FFMA)")


def kernels(module: str) -> list[tuple[str, str]]:
    """(name, source) of every Triton kernel in a module that Inductor generated."""
    return re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", module, re.S)


def measure(name: str, source: str, capability: int) -> dict[str, object]:
    """Registers per thread, spilled bytes, shared memory, and the opcodes of each innermost loop that multiplies."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(PyCodeCache.load(source), name)
    (config,) = kernel.configs
    meta = kernel._create_compile_meta(config)
    compiled = triton.compile(
        ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0]),
        target=GPUTarget("cuda", capability, 32),
        options=kernel._create_compile_options(config, meta),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [knobs.nvidia.cuobjdump.path, file.name]
        text = subprocess.check_output([dump[0], "-sass", dump[1]], text=True)
        usage = subprocess.check_output([dump[0], "--dump-resource-usage", dump[1]], text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    instructions = [(int(at, 16), opcode, rest) for at, opcode, rest in INSTRUCTION.findall(text)]
    loops = [
        [opcode for at, opcode, _ in instructions if first <= at <= last] for first, last in _innermost(instructions)
    ]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "float64": "f64" in compiled.asm["ptx"],
        "opcodes": dict(Counter(opcode.split(".")[0] for _, opcode, _ in instructions)),
        "loops": [
            {"total": len(loop), **Counter(".".join(o.split(".")[: 2 if o.startswith("MUFU") else 1]) for o in loop)}
            for loop in loops
            if any(MATMUL.match(opcode) for opcode in loop)
        ],
    }


def _innermost(instructions: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """Address ranges of the backward branches that hold no other."""
    jumps = set()
    for at, opcode, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            jumps.add((int(target[1], 16), at))
    return sorted(x for x in jumps if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in jumps))
