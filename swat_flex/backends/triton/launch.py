"""What the kernels of a call are launched with, for one configuration and one target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swat_flex.backends.triton.config import (
    Kernel,
    TritonConfig,
    compiler_options,
    runs_on,
    shares_reciprocals,
)
from swat_flex.backends.triton.descriptors import described, padded
from swat_flex.operands import Operands

FLOAT16_SHIFT = 15  # weights are rounded times 2¹⁵: the largest, 1, stays below float16's 65,504


class Launch(NamedTuple):
    """A kernel, the number of its programs, its arguments in order, and its constants and Triton's options by name."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](*self.args, **self.options)


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
        self.batch, self.q_heads, self.q_len, head_dim = q.shape
        self.kv_heads, self.kv_len, value_dim = k.shape[1], k.shape[2], v.shape[3]
        self.group = self.q_heads // self.kv_heads
        self.widths = (head_dim, padded(head_dim)), (value_dim, padded(value_dim))
        left, right = operands.window.clamped(self.q_len, self.kv_len)
        # The parts of a distance split by rows and columns would cancel in float32.
        self.both_sides = right > 0 or q.dtype == torch.float32
        per_head = tuple(None if x is None else x.contiguous() for x in (operands.slopes, operands.logit_bias))
        documents = None
        if document_ids is not None:
            documents = document_ids.contiguous(), self.kv_len if document_ids.dim() == 2 else 0
        self.shared = (
            per_head,
            documents,
            self.q_len,
            self.kv_len,
            left,
            right,
            operands.scale,
            self.q_heads,
            self.group,
        )

    @property
    def padded_dim(self) -> int:
        """The larger of the padded head dimensions."""
        return max(padded for _, padded in self.widths)

    def forward(self, config: TritonConfig, out: Tensor) -> Launch:
        from swat_flex.backends.triton.forward import forward_kernel

        programs = config.forward_programs(self.q_len, self.q_heads, self.group) * self.batch
        return self._launch("forward", config, forward_kernel, programs, (self.q, self.k, self.v, out), ())

    def query_gradient(
        self, config: TritonConfig, grad: Tensor, dx_scale: Tensor | None, dq: Tensor, partial: Tensor | None
    ) -> Launch:
        from swat_flex.backends.triton.backward import query_gradient_kernel

        programs = _blocks(self.q_len, config.block_m) * self.q_heads * self.batch
        tensors, rest = (grad, self.q, self.k, self.v, dq), (partial, dx_scale)
        return self._launch("query_gradient", config, query_gradient_kernel, programs, tensors, rest)

    def key_gradients(
        self, config: TritonConfig, grad: Tensor, dx_scale: Tensor | None, dk: Tensor, dv: Tensor
    ) -> Launch:
        from swat_flex.backends.triton.backward import key_gradients_kernel

        programs = _blocks(self.kv_len, config.block_n) * self.kv_heads * self.batch
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
            "WIDTH": self.widths[0],
            "VALUE_WIDTH": self.widths[1],
            "WAY": (self.problem.has_slopes, self.both_sides, shift, kernel_kind(name, config, self)),
            "BM": config.block_m,
            "BN": config.block_n,
            "STAGES": config.stages,
        }
        if name == "forward":
            options |= {"SPECIALIZE": config.warp_specialize, "PAIR": config.pairing(self.group)}
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


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
