"""Our own Triton kernels, compiled for a target and read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swat_flex.backends.triton import TritonConfig, configuration
from swat_flex.backends.triton.offline import KERNELS, compile_kernel
from swat_flex.inspection.kernel import Inspection, inspect_kernel
from swat_flex.inspection.loops import Loop
from swat_flex.problem import SwatProblem, WindowLike

PRODUCTS = {"forward": (1, 1), "query_gradient": (2, 1), "key_gradients": (2, 2)}  # of width D, of width Dv


@dataclass(frozen=True, slots=True)
class OwnKernel:
    """A kernel of ours.

    Attributes:
        name: which.
        config: its default configuration.
        found: what its machine code says.
        flops: floating-point operations of its matrix products in one iteration of one block.
        interior: the loop over tiles that need no mask, the shortest that multiplies; None where it has no loop.
    """

    name: str
    config: TritonConfig
    found: Inspection
    flops: float
    interior: Loop | None


def own_kernels(head_dim: int, window: WindowLike, target: str) -> list[OwnKernel]:
    """Forward, dq and dk/dv in bfloat16 for value and key heads of one width."""
    problem = SwatProblem.of_self_attention(8, 8192, head_dim, torch.bfloat16, "cuda", window)
    kernels = []
    for name in KERNELS:
        config = configuration(problem)[name]
        found = inspect_kernel(compile_kernel(name, problem, target))
        products = [loop for loop in found.loops if loop.counts.get("tensor core")]
        interior = min(products, key=lambda loop: len(loop.instructions), default=None)
        flops = 2.0 * config.block_m * config.block_n * head_dim * sum(PRODUCTS[name])
        kernels.append(OwnKernel(name, config, found, flops, interior))
    return kernels
