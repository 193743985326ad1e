"""What the kernels of a call are launched with, for one configuration and one target."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from swat_flex import tuned
from swat_flex.backends.triton.config import (
    Kernel,
    TritonConfig,
    compiler_options,
    runs_on,
    shares_reciprocals,
)
from swat_flex.backends.triton.descriptors import described, padded
from swat_flex.operands import Operands
from swat_flex.problem import Problem
from swat_flex.tuned import Config, Tunable

Result = TypeVar("Result")

FLOAT16_SHIFT = 15  # weights are rounded times 2¹⁵: the largest, 1, stays below float16's 65,504


class Launch(NamedTuple):
    """A kernel, the number of its programs, its arguments in order, and its constants and Triton's options by name."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> Launch:
        """Run it and return it."""
        self.kernel[(self.programs,)](*self.args, **self.options)
        return self


class Launches:
    """The launches of one call, made from what they share.

    Args:
        operands: the call.
        target: "sm_90", "gfx942", …, or "interpreter".
    """

    def __init__(self, operands: Operands, target: str) -> None:
        q, k, v, document_ids = operands.q, operands.k, operands.v, operands.document_ids
        self.q, self.k, self.v = q, k, v
        self.target, self.problem = target, operands.problem()
        of = self.problem
        left, right = of.window.clamped(of.q_len, of.kv_len)
        # The parts of a distance split by rows and columns would cancel in float32.
        self.both_sides = right > 0 or q.dtype == torch.float32
        per_head = tuple(None if x is None else x.contiguous() for x in (operands.slopes, operands.logit_bias))
        documents = None
        if document_ids is not None:
            documents = document_ids.contiguous(), of.kv_len if document_ids.dim() == 2 else 0
        self.shared = per_head, documents, of.q_len, of.kv_len, left, right, operands.scale, of.q_heads, of.group

    @property
    def padded_dim(self) -> int:
        """The larger of the padded head dimensions."""
        return padded(max(self.problem.head_dim, self.problem.value_dim))

    def forward(self, config: TritonConfig, out: Tensor) -> Launch:
        from swat_flex.backends.triton.forward import forward_kernel

        of = self.problem
        programs = config.forward_programs(of.q_len, of.q_heads, of.group) * of.batch
        return self._launch("forward", config, forward_kernel, programs, (self.q, self.k, self.v, out), ())

    def query_gradient(
        self, config: TritonConfig, grad: Tensor, dx_scale: Tensor | None, dq: Tensor, partial: Tensor | None
    ) -> Launch:
        from swat_flex.backends.triton.backward import query_gradient_kernel

        programs = -(-self.problem.q_len // config.block_m) * self.problem.q_heads * self.problem.batch
        tensors, rest = (grad, self.q, self.k, self.v, dq), (partial, dx_scale)
        return self._launch("query_gradient", config, query_gradient_kernel, programs, tensors, rest)

    def key_gradients(
        self, config: TritonConfig, grad: Tensor, dx_scale: Tensor | None, dk: Tensor, dv: Tensor
    ) -> Launch:
        from swat_flex.backends.triton.backward import key_gradients_kernel

        programs = -(-self.problem.kv_len // config.block_n) * self.problem.kv_heads * self.problem.batch
        tensors = (grad, self.q, self.k, self.v, dk, dv)
        return self._launch("key_gradients", config, key_gradients_kernel, programs, tensors, (dx_scale,))

    def _launch(
        self, name: Kernel, config: TritonConfig, kernel: Any, programs: int, tensors: tuple[Tensor, ...],
        rest: tuple[Tensor | None, ...],
    ) -> Launch:  # fmt: skip
        """A launch on `tensors`, which come with strides, and `rest`; what the target lacks is switched off."""
        if not runs_on(name, replace(config, pair=None), self.target):
            config = replace(config, descriptors=False, warp_specialize=False)
        strides = [_strides(x) for x in tensors]
        given = described(name, config, tensors) if config.descriptors else tensors
        # Weights are stored as operands by all kernels but that of dq, which needs no shift.
        shift = FLOAT16_SHIFT if self.q.dtype == torch.float16 and name != "query_gradient" else 0
        options = compiler_options(config) | {
            "WIDTH": (self.problem.head_dim, padded(self.problem.head_dim)),
            "VALUE_WIDTH": (self.problem.value_dim, padded(self.problem.value_dim)),
            "WAY": (self.problem.has_slopes, self.both_sides, shift, kernel_kind(name, config, self)),
            "BM": config.block_m,
            "BN": config.block_n,
            "STAGES": config.stages,
        }
        if name == "forward":
            options |= {"SPECIALIZE": config.warp_specialize, "PAIR": config.pairing(self.problem.group)}
        return Launch(kernel, programs, (*given, *rest, *strides, *self.shared), options)


def kernel_kind(name: Kernel, config: TritonConfig, launches: Launches) -> int:
    """Choose how a kernel computes σ, by fours where its tiles allow that."""
    from swat_flex.backends.triton import sigmoid

    kind = sigmoid_kind(launches.q.dtype, launches.problem.activation, launches.target)
    if kind == sigmoid.SINGLE.value and shares_reciprocals(name, config, launches.padded_dim, launches.target):
        return int(sigmoid.SHARED.value)
    return kind


def sigmoid_kind(dtype: torch.dtype, activation: str, target: str) -> int:
    """Choose how a kernel computes σ of each score alone: one of sigmoid.py's kinds."""
    from swat_flex.backends.triton import sigmoid

    if activation == "tanh-sigmoid":
        return int(sigmoid.TANH.value)
    ampere = target.startswith("sm_") and int(target.removeprefix("sm_")) >= 80
    return int((sigmoid.SINGLE if ampere and dtype != torch.float32 else sigmoid.PLAIN).value)


def target_of(device: torch.device) -> str:
    """ "sm_90", "gfx942", …; "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{10 * major + minor}"


def _strides(x: Tensor) -> tuple[int | None, ...]:
    """Strides in elements; a fifth entry where offsets inside a block of 256 × 256 may exceed 32 bits."""
    strides = x.stride()
    return strides if 256 * (strides[2] + strides[3]) < 2**31 else (*strides, None)


def candidates(tunable: Tunable[Config], problem: Problem, defaults: tuple[Config, ...]) -> tuple[Config, ...]:
    """List what was measured fastest, then the defaults; the one in force alone, which must not be replaced."""
    if (forced := tuned.forced(tunable)) is not None:
        return (forced,)
    winner = tuned.lookup(tunable, problem)
    return defaults if winner is None else (winner, *defaults)


def first_fitting(configs: tuple[Config, ...], run: Callable[[Config], Result]) -> Result:
    """Run with the first configuration that the device has room for; the last is not caught."""
    from triton.runtime.errors import OutOfResources

    *larger, smallest = configs
    for config in larger:
        with contextlib.suppress(OutOfResources):
            return run(config)
    return run(smallest)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()
