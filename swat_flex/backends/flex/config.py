"""Kernel tiles of FlexAttention on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class FlexConfig:
    """What a GPU kernel is made of: tiles of queries × keys in tokens, warps, pipeline stages.

    forward: (queries, keys, warps, stages).
    backward: (queries, keys, warps, stages) of the half that sums key and value gradients; the half that sums query
        gradients has the two exchanged. Queries divide keys, since each tile of keys walks over whole tiles of
        queries.
    """

    forward: tuple[int, int, int, int]
    backward: tuple[int, int, int, int]

    def options(self) -> dict[str, Any]:
        """FlexAttention's `kernel_options`. float32 multiplies in IEEE float32, whatever TF32 setting holds."""
        m, n, warps, stages = self.forward
        m1, n1, backward_warps, backward_stages = self.backward
        return {
            "BACKEND": "TRITON",
            "FLOAT32_PRECISION": "'ieee'",
            **{"fwd_BLOCK_M": m, "fwd_BLOCK_N": n, "fwd_num_warps": warps, "fwd_num_stages": stages},
            **{"bwd_BLOCK_M1": m1, "bwd_BLOCK_N1": n1, "bwd_BLOCK_M2": n1, "bwd_BLOCK_N2": m1},
            **{"bwd_num_warps": backward_warps, "bwd_num_stages": backward_stages},
        }


# By dtype and the larger head dimension, rounded up. All fit the 99 KiB of shared memory of the smallest GPUs; those of
# _HALF spill nothing on sm_90 and 16 bytes at most on sm_80.
_HALF = {
    64: FlexConfig((128, 64, 4, 3), (32, 128, 8, 2)),
    128: FlexConfig((128, 64, 8, 2), (32, 64, 8, 2)),
    256: FlexConfig((64, 32, 4, 2), (32, 32, 8, 2)),
}
_FLOAT32 = {
    64: FlexConfig((64, 32, 8, 1), (32, 32, 8, 1)),
    128: FlexConfig((32, 32, 8, 1), (16, 16, 8, 1)),
    256: FlexConfig((32, 16, 8, 1), (16, 16, 8, 2)),
}


def choose(head_dim: int, value_dim: int, dtype: torch.dtype) -> FlexConfig:
    """For padded or unpadded head dimensions."""
    width = max(head_dim, value_dim)
    return (_FLOAT32 if dtype == torch.float32 else _HALF)[64 if width <= 64 else 128 if width <= 128 else 256]
