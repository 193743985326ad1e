"""Backend `triton`: our own kernels, forward and backward, for NVIDIA and AMD GPUs.

Two loops over key tiles: the window's edges masked, the interior without mask arithmetic. There a logit costs one fused
multiply-add, σ 1.25 special functions. Sums are float32; the backward recomputes the logits, adds nothing atomically
and repeats to the bit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swat_flex import tuned
from swat_flex.backends.operator import Gradients, define, empty_output
from swat_flex.backends.triton.config import VALUES, Kernel, TritonConfig, compiler_options, configurations, runs_on
from swat_flex.backends.triton.descriptors import described, padded
from swat_flex.operands import Operands
from swat_flex.positions import per_head_dtype
from swat_flex.problem import Problem
from swat_flex.tuned import Tunable

FLOAT16_SHIFT = 15  # weights are rounded times 2¹⁵: the largest, 1, stays below float16's 65,504

_INSTALLED = importlib.util.find_spec("triton") is not None


def supports(problem: Problem) -> str | None:
    """Why `triton` cannot run this problem, or None."""
    if not _INSTALLED:
        return "triton is not installed"
    if problem.activation == "softmax":
        return "activation='softmax' is for baselines, which naive, banded and flex have"
    if problem.dtype == torch.float64:
        return "the kernels sum in float32, which float64 would not survive"
    if problem.device.type == "cuda":
        return None
    if problem.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernels need a GPU, got {problem.device.type}"
    if problem.dtype == torch.bfloat16 or problem.activation == "tanh-sigmoid":
        return "Triton's interpreter has neither bfloat16 products nor the hardware tanh"
    return None


def configuration(problem: Problem, target: str | None = None) -> dict[Kernel, TritonConfig]:
    """What a call runs with where nothing was measured, kernel by kernel.

    Args:
        problem: which call.
        target: "sm_90", "gfx942", …; None is the current GPU, and sm_90 where there is none.
    """
    if target is None:
        target = _target(torch.device("cuda")) if torch.cuda.is_available() else "sm_90"
    widest = max(padded(problem.head_dim), padded(problem.value_dim))
    kernels: tuple[Kernel, ...] = ("forward", "query_gradient", "key_gradients")
    return {kernel: configurations(kernel, widest, problem.dtype.itemsize, target)[0] for kernel in kernels}


def tunables(problem: Problem) -> tuple[Tunable[TritonConfig], ...]:
    """What a call of this problem looks up."""
    return tuple(TUNABLES.values()) if problem.needs_grad else (TUNABLES["forward"],)


def _tunable(kernel: Kernel, *files: str) -> Tunable[TritonConfig]:
    def default(problem: Problem) -> TritonConfig:
        return configuration(problem)[kernel]

    folder = Path(__file__).parent
    return Tunable(
        name=f"triton.{kernel}",
        config_type=TritonConfig,
        choices=lambda problem: VALUES if kernel == "forward" else VALUES | {"pair": (None,)},
        is_valid=TritonConfig.is_valid,
        default=default,
        files=tuple(folder / file for file in ("op.py", "sigmoid.py", "tiles.py", "descriptors.py", *files)),
    )


TUNABLES: dict[Kernel, Tunable[TritonConfig]] = {
    "forward": _tunable("forward", "forward.py"),
    "query_gradient": _tunable("query_gradient", "backward.py"),
    "key_gradients": _tunable("key_gradients", "backward.py"),
}


class _Call:
    """What the kernels of one call have in common."""

    def __init__(self, operands: Operands) -> None:
        q, k, v, ids = operands.q, operands.k, operands.v, operands.document_ids
        self.q, self.k, self.v = q, k, v
        vectors = (operands.slopes, operands.logit_bias, ids)
        self.vectors = tuple(None if x is None else x.contiguous() for x in vectors)
        q_len, kv_len, head_dim, value_dim = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
        left, right = operands.window.clamped(q_len, kv_len)
        document_stride = kv_len if ids is not None and ids.dim() == 2 else 0
        self.group = q.shape[1] // k.shape[1]
        self.sizes = (q_len, kv_len, left, right, operands.scale, q.shape[1], self.group, document_stride)
        self.padded = padded(head_dim), padded(value_dim)
        self.constants: dict[str, Any] = {
            "D": head_dim, "DV": value_dim, "BD": self.padded[0], "BDV": self.padded[1],
            "BOTH_SIDES": right > 0 or q.dtype == torch.float32,  # the parts of a split distance would cancel
            "KIND": _kind(q, operands.activation),
        }  # fmt: skip
        self.shift = FLOAT16_SHIFT if q.dtype == torch.float16 else 0
        self.problem = operands.problem()

    def launch(self, kernel: Any, name: Kernel, tiles: Callable[[TritonConfig], int], *args: Any, **more: Any) -> None:
        """Run a kernel over `tiles` programs, with the first configuration that the device has room for."""
        from triton.runtime.errors import OutOfResources

        candidates = self._candidates(name)
        for config in candidates:
            launched, special = config, config.descriptors or config.warp_specialize
            if special and not runs_on(name, config, _target(self.q.device)):
                launched = replace(config, descriptors=False, warp_specialize=False)
            given = described(name, launched, args) if launched.descriptors else args
            settings = _settings(name, launched, self.group)
            try:
                kernel[(tiles(config),)](*given, *self.sizes, **self.constants, **more, **settings)
                return
            except OutOfResources:
                if config is candidates[-1]:
                    raise

    def _candidates(self, name: Kernel) -> tuple[TritonConfig, ...]:
        """What was measured fastest, then the defaults; the one in force alone, which must not be replaced."""
        tunable = TUNABLES[name]
        if (forced := tuned.forced(tunable)) is not None:
            return (forced,)
        winner = tuned.lookup(tunable, self.problem)
        defaults = configurations(name, max(self.padded), self.q.element_size(), _target(self.q.device))
        return defaults if winner is None else (winner, *defaults)


def _settings(name: Kernel, config: TritonConfig, group: int) -> dict[str, Any]:
    """A configuration in the words of a launch."""
    settings: dict[str, Any] = {"BM": config.block_m, "BN": config.block_n, "STAGES": config.stages}
    if name == "forward":
        settings |= {"SPECIALIZE": config.warp_specialize, "PAIR": config.pairing(group)}
    return settings | compiler_options(config)


def _target(device: torch.device) -> str:
    """ "sm_90", "gfx942", …; "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


def _kind(q: Tensor, activation: str) -> Any:
    from swat_flex.backends.triton import sigmoid

    if activation == "tanh-sigmoid":
        return sigmoid.TANH
    ampere = (
        q.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(q.device)[0] >= 8
    )
    return sigmoid.FAST if ampere and q.dtype != torch.float32 else sigmoid.PLAIN


def _strides(x: Tensor) -> tuple[int | None, ...]:
    """In elements; a fifth entry where an offset inside a tile, of at most 256 rows and columns, may exceed 32 bits."""
    strides = x.stride()
    return strides if 256 * (strides[2] + strides[3]) < 2**31 else (*strides, None)


def _tiles(length: int, block: int) -> int:
    return -(-length // block)


def _forward(operands: Operands) -> Tensor:
    from swat_flex.backends.triton.forward import forward_kernel

    q, k, v = operands.q, operands.k, operands.v
    call = _Call(operands)
    out = empty_output(q, v.shape[3])
    with _on(q):
        call.launch(
            forward_kernel, "forward", lambda c: c.forward_programs(q.shape[2], q.shape[1], call.group) * q.shape[0],
            q, k, v, *call.vectors, out, *(_strides(x) for x in (q, k, v, out)), SHIFT=call.shift,
        )  # fmt: skip
    return out


def _backward(grad: Tensor, operands: Operands, per_head: bool) -> Gradients:
    from swat_flex.backends.triton.backward import key_gradients_kernel, query_gradient_kernel

    q, k, v = operands.q, operands.k, operands.v
    call = _Call(operands)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    batch, q_heads, q_len, _ = q.shape
    scale = _logit_gradient_scale(grad, v) if q.dtype == torch.float16 else None
    partial = None
    if per_head:
        programs = batch * q_heads * _tiles(q_len, 16)  # no configuration has smaller tiles
        partial = torch.zeros(2 * programs, dtype=torch.float32, device=q.device)
    shared = (grad, q, k, v, *call.vectors, scale)
    strides = [_strides(x) for x in (grad, q, k, v)]
    programs = 0

    def query_tiles(config: TritonConfig) -> int:
        nonlocal programs
        programs = _tiles(q_len, config.block_m) * q_heads * batch
        return programs

    with _on(q):
        call.launch(query_gradient_kernel, "query_gradient", query_tiles, *shared, dq, partial, *strides, _strides(dq))
        call.launch(
            key_gradients_kernel, "key_gradients", lambda c: _tiles(k.shape[2], c.block_n) * k.shape[1] * batch,
            *shared, dk, dv, *strides, _strides(dk), _strides(dv), SHIFT=call.shift,
        )  # fmt: skip
    if partial is None:
        return dq, dk, dv, torch.zeros(2, q_heads, dtype=per_head_dtype(q), device=q.device)
    return dq, dk, dv, partial[: 2 * programs].view(2, batch, q_heads, -1).sum((1, 3))


def _logit_gradient_scale(grad: Tensor, v: Tensor) -> Tensor:
    """`[1]` float32, on the device: the power of two that puts the bound of |dw·w(1 − w)| just below 2¹⁵.

    |dw| = |⟨do_i, v_j⟩| ≤ ‖do_i‖·‖v_j‖ and w(1 − w) ≤ ¼. Held to 2^±60, so that zeros and infinities stay harmless.
    """
    longest = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax() for x in (grad, v)]
    return torch.exp2((17 - torch.log2(longest[0] * longest[1])).floor().clamp(-60, 60)).reshape(1)


def _on(x: Tensor) -> Any:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


swat = define("triton", _forward, _backward)
