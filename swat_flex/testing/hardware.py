"""What the error rule allows where a GPU's own exponential and reciprocal compute σ."""

from __future__ import annotations

import torch

ULPS = 2.0  # units in the last place by which a GPU's exponential, logarithm and reciprocal may be off
SHARE = 2.0  # of the budget of float32


def allowed_use(dtype: torch.dtype, device: torch.device | str) -> float:
    """Return the share of the budget (`Budget.use`) that a result may take: all of it, twice that in float32 on a GPU.

    The budget of float32 is what float32 itself loses with a correctly rounded exp. A GPU's `ex2.approx`, `lg2.approx`
    and `rcp.approx` are off by up to `ULPS`, which in 16 bits vanishes behind the rounding of the weights, and in
    float32 adds to it: up to 1.5 times the budget on long rows without a window. Faults are far above 2: operands in
    TF32 take hundreds.
    """
    on_gpu = torch.device(device).type not in ("cpu", "meta")
    return SHARE if dtype == torch.float32 and on_gpu else 1.0
