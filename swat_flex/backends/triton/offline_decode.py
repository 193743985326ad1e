"""The decode kernel compiled for a GPU that need not be here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from swat_flex.backends.triton.config import DecodeConfig, compiler_options
from swat_flex.backends.triton.decode_op import decode_configuration, row_tile
from swat_flex.backends.triton.descriptors import padded
from swat_flex.backends.triton.offline import _TYPES
from swat_flex.backends.triton.op import FLOAT16_SHIFT
from swat_flex.problem import Problem

MULTIPROCESSORS = 132  # of the Hopper GPUs; they decide the number of splits


def offline_configuration(problem: Problem) -> DecodeConfig:
    """What a step runs with: `problem.q_len` new tokens against a ring of `problem.kv_len` slots."""
    config = decode_configuration(problem)
    return replace(config, splits=splits_of(config, problem))


def splits_of(config: DecodeConfig, problem: Problem, multiprocessors: int = MULTIPROCESSORS) -> int:
    """Splits of a launch for this problem."""
    rows = problem.q_heads // problem.kv_heads * problem.q_len
    programs = problem.batch * problem.kv_heads * -(-rows // row_tile(rows))
    return config.splits_of(programs, problem.kv_len, multiprocessors)


def compile_decode(problem: Problem, target: str, *, config: DecodeConfig | None = None) -> Any:
    """The kernel as a launch would specialise it for this problem, with its tensors contiguous and aligned.

    Args:
        problem: its group and number of new tokens (q_len) decide the tile, splits the type of what is written.
        target: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".
        config: None is what a step would run with.

    Returns:
        Triton's compiled kernel, with `.asm` and `.metadata`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from swat_flex.backends.triton import sigmoid
    from swat_flex.backends.triton.decode import decode_kernel

    config = config or offline_configuration(problem)
    amd = target.startswith("gfx")
    element = _TYPES[str(problem.dtype).removeprefix("torch.")]
    group = problem.q_heads // problem.kv_heads
    constants = {
        "D": problem.head_dim, "DV": problem.value_dim, "BD": padded(problem.head_dim),
        "BDV": padded(problem.value_dim), "SHIFT": FLOAT16_SHIFT if element == "fp16" else 0,
        "KIND": (sigmoid.PLAIN if amd or element == "fp32" else sigmoid.FAST).value,
        "ONE": problem.q_len == 1, "BM": row_tile(group * problem.q_len), "BN": config.block_n, "STAGES": config.stages,
    }  # fmt: skip
    pointers = {"q": f"*{element}", "keys": f"*{element}", "values": f"*{element}", "length": "*i64",
                "out": "*fp32" if splits_of(config, problem) > 1 else f"*{element}"}  # fmt: skip
    pointers |= {name: "*fp32" for name in ("slopes", "logit_bias") if getattr(problem, f"has_{name}")}
    whole = {"tokens": problem.q_len, "group": group}
    constants |= {name: None for name in ("slopes", "logit_bias") if name not in pointers}
    constants |= {name: 1 for name, value in whole.items() if value == 1}
    aligned = problem.head_dim % 16 == problem.value_dim % 16 == 0
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, argument in enumerate(decode_kernel.arg_names):
        if argument.endswith("_strides"):
            signature[argument] = ("i32", "i32", "i32", "constexpr")
            values[i, 3] = 1
            attributes |= {(i, axis): [["tt.divisibility", 16]] for axis in range(3) if aligned}
        elif argument in constants:
            signature[argument], values[i,] = "constexpr", constants[argument]
        elif argument in pointers:
            signature[argument] = pointers[argument]
            attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source = ASTSource(decode_kernel, signature, values, attributes)
    return triton.compile(source, target=gpu, options=compiler_options(config))
