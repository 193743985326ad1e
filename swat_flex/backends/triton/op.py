"""Backend `triton`: our own kernels, forward and backward, for NVIDIA and AMD GPUs.

Two loops over key tiles: the window's edges masked, the interior without mask arithmetic. There a logit costs one fused
multiply-add, σ 1.25 special functions. Sums are float32; the backward recomputes the logits, adds nothing atomically
and repeats to the bit.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from swat_flex.backends.operator import Gradients, define, empty_output, gradients_like
from swat_flex.backends.triton.config import KERNELS, VALUES, Kernel, TritonConfig, configurations, promising
from swat_flex.backends.triton.descriptors import padded
from swat_flex.backends.triton.launch import Launch, Launches, candidates, first_fitting, on_device_of, target_of
from swat_flex.operands import Operands
from swat_flex.problem import Problem
from swat_flex.tuned import Tunable

_INSTALLED = importlib.util.find_spec("triton") is not None


def supports(problem: Problem) -> str | None:
    """Say why `triton` cannot run this problem, or return None."""
    if not _INSTALLED:
        return "triton is not installed"
    if problem.activation == "softmax":
        return "activation='softmax' is for baselines, which naive, banded and flex have"
    if problem.dtype == torch.float64:
        return "the kernels sum in float32, which float64 would not survive"
    if problem.device.type == "cuda" and problem.activation == "tanh-sigmoid" and torch.version.hip is not None:
        return "activation='tanh-sigmoid' is an instruction of NVIDIA's GPUs, which AMD's lack"
    if problem.device.type == "cuda":
        return None
    if problem.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernels need a GPU, got {problem.device.type}"
    if problem.dtype == torch.bfloat16 or problem.activation == "tanh-sigmoid":
        return "Triton's interpreter has neither bfloat16 products nor the hardware tanh"
    return None


def configuration(problem: Problem, target: str | None = None) -> dict[Kernel, TritonConfig]:
    """Return what a call runs with where nothing was measured, kernel by kernel.

    Args:
        problem: which call.
        target: "sm_90", "gfx942", …; None is the current GPU, and sm_90 where there is none.
    """
    if target is None:
        target = target_of(torch.device("cuda")) if torch.cuda.is_available() else "sm_90"
    widest = padded(max(problem.head_dim, problem.value_dim))
    return {kernel: configurations(kernel, widest, problem.dtype.itemsize, target)[0] for kernel in KERNELS}


def tunables(problem: Problem) -> tuple[Tunable[TritonConfig], ...]:
    """List what a call of this problem looks up."""
    return tuple(TUNABLES.values()) if problem.needs_grad else (TUNABLES["forward"],)


SHARED_FILES = ("op.py", "launch.py", "sigmoid.py", "tiles.py", "descriptors.py")


def _tunable(kernel: Kernel, *files: str) -> Tunable[TritonConfig]:
    def default(problem: Problem) -> TritonConfig:
        return configuration(problem)[kernel]

    def first(problem: Problem) -> tuple[TritonConfig, ...]:
        return promising(kernel, padded(max(problem.head_dim, problem.value_dim)), problem.dtype.itemsize)

    folder = Path(__file__).parent
    return Tunable(
        name=f"triton.{kernel}",
        config_type=TritonConfig,
        choices=lambda problem: VALUES if kernel == "forward" else VALUES | {"pair": (None,)},
        is_valid=TritonConfig.is_valid,
        default=default,
        first=first,
        files=tuple(folder / file for file in (*SHARED_FILES, *files)),
    )


TUNABLES: dict[Kernel, Tunable[TritonConfig]] = {
    "forward": _tunable("forward", "forward.py"),
    "query_gradient": _tunable("query_gradient", "backward.py"),
    "key_gradients": _tunable("key_gradients", "backward.py"),
}


def _run(name: Kernel, launches: Launches, launch: Callable[[TritonConfig], Launch]) -> Launch:
    """Run a kernel with the first configuration that the device has room for, and return what ran."""
    problem = launches.problem
    defaults = configurations(name, launches.padded_dim, problem.dtype.itemsize, launches.target)
    return first_fitting(candidates(TUNABLES[name], problem, defaults), lambda config: launch(config).run())


def _forward(operands: Operands) -> Tensor:
    launches, out = Launches(operands, target_of(operands.q.device)), empty_output(operands.q, operands.v.shape[3])
    with on_device_of(out):
        _run("forward", launches, lambda config: launches.forward(config, out))
    return out


def _backward(grad: Tensor, operands: Operands, per_head: bool) -> Gradients:
    q, k, v = operands.q, operands.k, operands.v
    launches = Launches(operands, target_of(q.device))
    dq, dk, dv, d_per_head = gradients_like(q, k, v)
    batch, q_heads, q_len, _ = q.shape
    up = _logit_gradient_scale(grad, v) if q.dtype == torch.float16 else None
    partial = None
    if per_head:
        programs = batch * q_heads * -(-q_len // 16)  # no configuration has smaller blocks
        partial = torch.zeros(2 * programs, dtype=torch.float32, device=q.device)
    with on_device_of(q):
        ran = _run("query_gradient", launches, lambda c: launches.query_gradient(c, grad, up, dq, partial))
        _run("key_gradients", launches, lambda c: launches.key_gradients(c, grad, up, dk, dv))
    if partial is None:
        return dq, dk, dv, d_per_head.zero_()
    return dq, dk, dv, partial[: 2 * ran.programs].view(2, batch, q_heads, -1).sum((1, 3))


def _logit_gradient_scale(grad: Tensor, v: Tensor) -> Tensor:
    """`[1]` float32, on the device: the power of two that puts the bound of |dw·w(1 − w)| just below 2¹⁵.

    |dw| = |⟨do_i, v_j⟩| ≤ ‖do_i‖·‖v_j‖ and w(1 − w) ≤ ¼. Held to 2^±60, so that zeros and infinities stay harmless.
    """
    longest = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (grad, v)]
    return torch.exp2((17 - torch.log2(longest[0] * longest[1])).floor().clamp(-60, 60)).reshape(1)


swat = define("triton", _forward, _backward)
