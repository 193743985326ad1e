"""Our own Triton kernels, compiled for a target and read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from swat_flex.backends.triton import DecodeConfig, TritonConfig, configuration
from swat_flex.backends.triton.config import KERNELS
from swat_flex.backends.triton.offline import compile_decode, compile_kernel, offline_configuration
from swat_flex.inspection.kernel import Inspection, inspect_kernel
from swat_flex.inspection.loops import Loop
from swat_flex.problem import Problem, WindowLike

PRODUCTS = {"forward": (1, 1), "query_gradient": (2, 1), "key_gradients": (2, 2)}  # of width D, of width Dv


@dataclass(frozen=True, slots=True)
class OwnKernel:
    """A kernel of ours.

    Attributes:
        name: which.
        config: its default configuration.
        found: what its machine code says.
        flops: floating-point operations of its matrix products in one iteration of one block; None where they are not
            what it is for.
        bytes_moved: bytes of memory that one iteration of one block of it moves; None where it reuses what it reads.
        copied: bytes that it moves for one sequence and one key head, all blocks together; None likewise.
    """

    name: str
    config: TritonConfig | DecodeConfig
    found: Inspection
    flops: float | None
    bytes_moved: float | None = None
    copied: int | None = None

    @property
    def interior(self) -> Loop | None:
        """The loop over tiles that need no mask: of those that multiply the one that compares least, or None."""
        products = [loop for loop in self.found.loops if loop.counts.get("tensor core")]
        return min(products, key=lambda loop: loop.counts["predicate"], default=None)


def own_kernels(head_dim: int, window: WindowLike, target: str) -> list[OwnKernel]:
    """Forward, dq, dk/dv and decode in bfloat16 for value and key heads of one width."""
    problem = Problem.of_self_attention(8, 8192, head_dim, torch.bfloat16, "cuda", window)
    kernels = []
    for name in KERNELS:
        config = configuration(problem, target)[name]
        found = inspect_kernel(compile_kernel(name, problem, target))
        flops = 2.0 * config.tiles * config.block_m * config.block_n * head_dim * sum(PRODUCTS[name])
        kernels.append(OwnKernel(name, config, found, flops))
    return [*kernels, _decode(problem, target)]


def _decode(problem: Problem, target: str) -> OwnKernel:
    """One new token per sequence against a full ring: each key and value is read once, so memory bounds it."""
    slots = problem.kv_len if problem.window.left is None else problem.window.left + 1
    step = replace(problem, q_len=1, kv_len=slots)
    config = offline_configuration(step)
    found = inspect_kernel(compile_decode(step, target))
    key_bytes = (step.head_dim + step.value_dim) * step.dtype.itemsize
    return OwnKernel("decode", config, found, None, bytes_moved=config.block_n * key_bytes, copied=slots * key_bytes)
