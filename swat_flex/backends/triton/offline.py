"""The kernels of a problem compiled for a GPU that need not be here, from the arguments that a launch would have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swat_flex.backends.operator import empty_output
from swat_flex.backends.triton import decode_op
from swat_flex.backends.triton.config import DecodeConfig, Kernel, TritonConfig, configurations
from swat_flex.backends.triton.launch import Launch, Launches
from swat_flex.operands import Operands
from swat_flex.problem import Problem

MULTIPROCESSORS = 132  # of the Hopper GPUs; they decide the number of a decode step's splits


def compile_kernel(
    name: Kernel, problem: Problem, target: str, *, per_head: bool = False, config: TritonConfig | None = None
) -> Any:
    """A kernel as a launch would specialise it for this problem, with its tensors contiguous and aligned.

    Args:
        target: "sm_80", "sm_90", "sm_100", "sm_120", "gfx942" or a relative.
        per_head: with the gradients of slopes and logit_bias (query_gradient).
        config: None is what a call would run with.

    Returns:
        Triton's compiled kernel, with `.asm` and `.metadata`.
    """
    q, k, v = _inputs(problem)
    vectors = _vectors(problem)
    ids = _meta(torch.int32, problem.batch, problem.kv_len) if problem.has_documents else None
    scale = problem.head_dim**-0.5
    launches = Launches(Operands(q, k, v, *vectors, ids, problem.window, scale, problem.activation), target)
    config = config or configurations(name, launches.padded_dim, problem.dtype.itemsize, target)[0]
    out = empty_output(q, problem.value_dim)
    dx_scale = _meta(torch.float32, 1) if problem.dtype == torch.float16 else None
    if name == "forward":
        launch = launches.forward(config, out)
    elif name == "query_gradient":
        partial = _meta(torch.float32, 1) if per_head else None
        launch = launches.query_gradient(config, out, dx_scale, torch.empty_like(q), partial)
    else:
        launch = launches.key_gradients(config, out, dx_scale, torch.empty_like(k), torch.empty_like(v))
    return compile_launch(launch, target)


def compile_decode(problem: Problem, target: str, *, config: DecodeConfig | None = None) -> Any:
    """The decode kernel as a launch would specialise it for this problem, with its tensors contiguous and aligned.

    The step is that of `problem.q_len` new tokens against a ring of `problem.kv_len` slots. `target` and `config` as in
    `compile_kernel`.
    """
    inputs = (*_inputs(problem), _meta(torch.int64, problem.batch), _vectors(problem))
    window = problem.kv_len - problem.q_len + 1
    config = config or offline_configuration(problem)
    _, launch, _ = decode_op.launches(config, inputs, window, problem.head_dim**-0.5, target, MULTIPROCESSORS)
    return compile_launch(launch, target)


def offline_configuration(problem: Problem) -> DecodeConfig:
    """Return what a decode step runs with on a GPU with `MULTIPROCESSORS`."""
    config = decode_op.DECODE.default(problem)
    rows = problem.group * problem.q_len
    programs = problem.batch * problem.kv_heads * -(-rows // decode_op.row_tile(rows))
    return replace(config, splits=config.splits_of(programs, problem.kv_len, MULTIPROCESSORS))


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile what a launch would run."""
    import triton
    from triton.compiler import ASTSource

    options, *source = specialised(launch, target)
    return triton.compile(ASTSource(launch.kernel, *source), target=_gpu(target), options=options.__dict__)


def specialised(launch: Launch, target: str) -> tuple[Any, ...]:
    """Return (options, signature, constants, attributes): all that a compilation depends on, as `JITFunction.run` makes
    it of a launch's arguments."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend, options = launch.kernel, make_backend(_gpu(target)), launch.options | {"debug": False}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, rest = binder(*launch.args, **options)
    return tuple(kernel._pack_args(backend, options, bound, specialisation, rest))


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    amd = target.startswith("gfx")
    return GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def _inputs(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    of = problem
    q = _meta(of.dtype, of.batch, of.q_heads, of.q_len, of.head_dim)
    k, v = (_meta(of.dtype, of.batch, of.kv_heads, of.kv_len, dim) for dim in (of.head_dim, of.value_dim))
    return q, k, v


def _vectors(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    slopes = _meta(torch.float32, problem.q_heads) if problem.has_slopes else None
    logit_bias = _meta(torch.float32, problem.q_heads) if problem.has_logit_bias else None
    return slopes, logit_bias


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory, at an address that counts as aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")
