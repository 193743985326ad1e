"""What FlexAttention's GPU kernels are made of: the defaults, and what the tuner may try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from swat_flex.backends.flex.blocks import BLOCK
from swat_flex.problem import Problem


@dataclass(frozen=True, slots=True)
class FlexConfig:
    """Kernel tiles of queries × keys in tokens, warps, pipeline stages, and FlexAttention's switches.

    block_m, block_n, warps, stages: of the forward.
    backward_m, backward_n, backward_warps, backward_stages: of the half of the backward that sums key and value
        gradients; in the half that sums query gradients the two are exchanged. Queries divide keys, since each tile of
        keys walks over whole tiles of queries.
    mask_block: tokens on each side of a tile of the block mask, which kernel tiles divide.
    tma, backward_tma: load through tensor memory accelerators (USE_TMA), where the device has them.
    contiguous: walk from tile to neighbouring tile (BLOCKS_ARE_CONTIGUOUS), which masks the interior too.
    rows_safe: leave out the care for rows that have seen nothing yet (ROWS_GUARANTEED_SAFE).
    prescale: scale q instead of the scores (PRESCALE_QK).
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    backward_m: int
    backward_n: int
    backward_warps: int
    backward_stages: int
    mask_block: int = BLOCK
    tma: bool = False
    backward_tma: bool = False
    contiguous: bool = False
    rows_safe: bool = False
    prescale: bool = False

    def is_valid(self) -> bool:
        sizes = (self.block_m, self.block_n, self.backward_m, self.backward_n)
        powers = all(n >= 16 and n & (n - 1) == 0 for n in sizes)
        divide = BLOCK % self.mask_block == 0 and all(self.mask_block % n == 0 for n in sizes)
        return powers and divide and self.backward_n % self.backward_m == 0

    def options(self) -> dict[str, Any]:
        """FlexAttention's `kernel_options`. float32 multiplies in IEEE float32, whatever TF32 setting holds."""
        m, n = self.backward_m, self.backward_n
        sizes = {"fwd_BLOCK_M": self.block_m, "fwd_BLOCK_N": self.block_n}
        sizes |= {"bwd_BLOCK_M1": m, "bwd_BLOCK_N1": n, "bwd_BLOCK_M2": n, "bwd_BLOCK_N2": m}
        sizes |= {"fwd_num_warps": self.warps, "fwd_num_stages": self.stages}
        sizes |= {"bwd_num_warps": self.backward_warps, "bwd_num_stages": self.backward_stages}
        switches = {
            "fwd_USE_TMA": self.tma,
            "bwd_USE_TMA": self.backward_tma,
            "BLOCKS_ARE_CONTIGUOUS": self.contiguous,
            "ROWS_GUARANTEED_SAFE": self.rows_safe,
            "PRESCALE_QK": self.prescale,
        }
        chosen = {name: True for name, on in switches.items() if on}
        return {"BACKEND": "TRITON", "FLOAT32_PRECISION": "'ieee'", **sizes, **chosen}

    def fitting(self, problem: Problem) -> FlexConfig:
        """Turn off the switches that would be wrong for this problem."""
        safe = self.rows_safe and problem.activation == "softmax" and rows_are_safe(problem)
        return replace(self, rows_safe=safe, contiguous=self.contiguous and not problem.has_documents)


def rows_are_safe(problem: Problem) -> bool:
    """Tell whether the first keys visited hold a visible one for every row of a tile, padded rows included.

    A window's left edge hides them from the last rows: −∞ − (−∞) there is NaN. So plain causal attention alone, and its
    softmax alone: log σ(x) is −∞ itself below −88, where steep slopes lead.
    """
    left, right = problem.window.left, problem.window.right
    causal = (left is None or left >= problem.kv_len) and right == 0
    return causal and not problem.has_documents and problem.q_len % BLOCK == 0 == problem.kv_len % BLOCK


# By dtype and the larger head dimension, rounded up. All fit the 99 KiB of shared memory of the smallest GPUs; those of
# _HALF spill nothing on sm_90 and 16 bytes at most on sm_80.
_HALF = {
    64: FlexConfig(128, 64, 4, 3, 32, 128, 8, 2),
    128: FlexConfig(128, 64, 8, 2, 32, 64, 8, 2),
    256: FlexConfig(64, 32, 4, 2, 32, 32, 8, 2),
}
_FLOAT32 = {
    64: FlexConfig(64, 32, 8, 1, 32, 32, 8, 1),
    128: FlexConfig(32, 32, 8, 1, 16, 16, 8, 1),
    256: FlexConfig(32, 16, 8, 1, 16, 16, 8, 2),
}


def choose(head_dim: int, value_dim: int, dtype: torch.dtype) -> FlexConfig:
    """Choose what runs where nothing was measured, for padded or unpadded head dimensions."""
    width = max(head_dim, value_dim)
    return (_FLOAT32 if dtype == torch.float32 else _HALF)[64 if width <= 64 else 128 if width <= 128 else 256]


def choices(problem: Problem) -> Mapping[str, Sequence[int | bool]]:
    """List by field of FlexConfig: the values worth trying. A backward's only where there is one.

    PRESCALE_QK hands a score modifier its scores in units of log2 e, which only an unmodified score survives.
    """
    default = choose(problem.head_dim, problem.value_dim, problem.dtype)
    softmax, causal = problem.activation == "softmax", (problem.window.left, problem.window.right) == (None, 0)
    single = problem.dtype == torch.float32  # no tensor cores: small tiles, nothing to prefetch
    sizes, stages, tma = ((16, 32, 64), (1, 2), (False,)) if single else ((32, 64, 128), (2, 3, 4), (False, True))
    values: dict[str, Sequence[int | bool]] = {
        "block_m": sizes,
        "block_n": sizes,
        "warps": (4, 8),
        "stages": stages,
        "backward_m": sizes,
        "backward_n": sizes,
        "backward_warps": (4, 8),
        "backward_stages": stages[:2],
        "mask_block": (BLOCK, BLOCK // 2),
        "tma": tma,
        "backward_tma": tma,
        "contiguous": (False,) if problem.has_documents else (False, True),
        "rows_safe": (False, True) if softmax and causal and not problem.has_documents else (False,),
        "prescale": (False, True) if softmax and not problem.has_slopes and not problem.has_logit_bias else (False,),
    }
    if not problem.needs_grad:
        values |= {name: (getattr(default, name),) for name in values if name.startswith("backward_")}
    return values
