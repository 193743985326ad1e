"""The kernels of a problem compiled for a GPU that need not be here."""

from __future__ import annotations

from typing import Any

from swat_flex.backends.triton.config import Kernel, TritonConfig, compiler_options, configurations
from swat_flex.backends.triton.descriptors import STREAMED, block_shape, padded
from swat_flex.backends.triton.op import FLOAT16_SHIFT
from swat_flex.problem import Problem

KERNELS: tuple[Kernel, ...] = ("forward", "query_gradient", "key_gradients")
_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_OPTIONAL = {"slopes": "*fp32", "logit_bias": "*fp32", "document_ids": "*i32", "dx_scale": "*fp32", "partial": "*fp32"}


def compile_kernel(
    name: Kernel, problem: Problem, target: str, *, per_head: bool = False, config: TritonConfig | None = None
) -> Any:
    """A kernel as a launch would specialise it for this problem, with its tensors contiguous and aligned.

    Args:
        name: which kernel.
        problem: its sizes do not matter, but for the head dimensions and the group being 1 or not.
        target: "sm_80", "sm_90", "sm_100", "sm_120" or "gfx942".
        per_head: with the gradients of slopes and logit_bias (query_gradient).
        config: None is what a call would run with.

    Returns:
        Triton's compiled kernel, with `.asm` and `.metadata`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from swat_flex.backends.triton import backward, forward

    kernel = {
        "forward": forward.forward_kernel,
        "query_gradient": backward.query_gradient_kernel,
        "key_gradients": backward.key_gradients_kernel,
    }[name]
    dims = padded(problem.head_dim), padded(problem.value_dim)
    config = config or configurations(name, max(dims), problem.dtype.itemsize, target)[0]
    amd = target.startswith("gfx")
    constants = _constants(name, problem, config, dims, amd)
    element = _TYPES[str(problem.dtype).removeprefix("torch.")]
    given = {"slopes": problem.has_slopes, "logit_bias": problem.has_logit_bias, "partial": per_head,
             "document_ids": problem.has_documents, "dx_scale": element == "fp16"}  # fmt: skip
    signature: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, argument in enumerate(kernel.arg_names):
        if argument.endswith("_strides"):
            signature[argument] = ("i32", "i32", "i32", "constexpr")
            values[i, 3] = 1
            if problem.head_dim % 16 == problem.value_dim % 16 == 0:
                attributes |= {(i, axis): [["tt.divisibility", 16]] for axis in range(3)}
        elif argument in constants or (argument == "group" and problem.q_heads == problem.kv_heads):
            signature[argument], values[i,] = "constexpr", constants.get(argument, 1)
        elif config.descriptors and i in STREAMED[name]:
            block = block_shape(name, config, problem.head_dim if argument in "qk" else problem.value_dim)
            signature[argument] = f"tensordesc<{element}{block}>"
        elif argument in _OPTIONAL and not given[argument]:
            signature[argument], values[i,] = "constexpr", None
        elif argument in _OPTIONAL or argument in ("grad", "q", "k", "v", "out", "dq", "dk", "dv"):
            signature[argument] = _OPTIONAL.get(argument, f"*{element}")
            attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=gpu, options=compiler_options(config))


def _constants(
    name: Kernel, problem: Problem, config: TritonConfig, dims: tuple[int, int], amd: bool
) -> dict[str, Any]:
    from swat_flex.backends.triton import sigmoid

    itemsize = problem.dtype.itemsize
    if problem.activation == "tanh-sigmoid":
        kind = sigmoid.TANH
    else:
        kind = sigmoid.PLAIN if amd or itemsize == 4 else sigmoid.FAST
    shift = FLOAT16_SHIFT if str(problem.dtype) == "torch.float16" else 0
    constants = {
        "D": problem.head_dim, "DV": problem.value_dim, "BD": dims[0], "BDV": dims[1],
        "BOTH_SIDES": problem.window.right != 0 or itemsize == 4, "KIND": kind.value, "SHIFT": shift,
        "BM": config.block_m, "BN": config.block_n, "STAGES": config.stages,
    }  # fmt: skip
    if name == "forward":
        constants |= {"SPECIALIZE": config.warp_specialize}
        constants |= {"PAIR": config.pairing(problem.q_heads // problem.kv_heads)}
    return constants
