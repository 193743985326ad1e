"""Tensors as the tensor memory accelerator reads them: which may, and with what tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from swat_flex.backends.triton.config import Kernel, TritonConfig

# Positions of the arguments that a kernel's loops read tile by tile: k and v, or the output's gradient and q.
STREAMED: dict[Kernel, tuple[int, int]] = {"forward": (1, 2), "query_gradient": (2, 3), "key_gradients": (0, 1)}

ALIGNMENT = 16  # bytes, of the address and of every stride but the last


def padded(dim: int) -> int:
    """A tile's columns: a power of two that a matrix product takes."""
    return max(16, 1 << (dim - 1).bit_length())


def block_shape(name: Kernel, config: TritonConfig, dim: int) -> list[int]:
    """Return the shape of one tile of a streamed `[B, H, L, dim]`."""
    return [1, 1, config.block_m if name == "key_gradients" else config.block_n, padded(dim)]


def described(name: Kernel, config: TritonConfig, args: Sequence[Any]) -> list[Any]:
    """A kernel's arguments with a descriptor for each streamed tensor that `qualifies`; the others stay pointers."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    found = list(args)
    for i in STREAMED[name]:
        x = args[i]
        if qualifies(x):
            # The stride of an axis of length 1 says nothing, and torch leaves anything there.
            strides = [s if n > 1 else ALIGNMENT for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
            block = block_shape(name, config, x.shape[3])
            found[i] = TensorDescriptor(x, list(x.shape), [*strides, 1], block)
    return found


def qualifies(x: Tensor) -> bool:
    """Tell whether the accelerator can address `[B, H, L, D]`: aligned, last axis contiguous, no axis expanded."""
    strides = [s * x.element_size() for n, s in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1]
    aligned = x.data_ptr() % ALIGNMENT == 0 and all(s % ALIGNMENT == 0 and 0 < s < 2**40 for s in strides)
    return aligned and x.stride(3) == 1
