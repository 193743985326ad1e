"""Sliding softmax as a ratio of sliding sigmoid sums, so that the kernels of `cpp` train the baselines too."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from swat_flex import flex_swat

DEEP = -40.0  # a logit_bias under which σ is in its tail: σ(x − 40) = e^(x − 40) to float32's rounding while x < 23
LANES = 8  # channels added to v: one counts a row's weights, the others fill up a vector of the kernels


def softmax_by_sums(q: Tensor, k: Tensor, v: Tensor, window: int | None, **given: Any) -> Tensor:
    """Σ σ(x − 40)·v over Σ σ(x − 40), which is softmax: one call of `flex_swat`, a channel of ones beside v.

    For scores of ordinary size and rows that see a key: beyond x = 23 a weight is too small by the factor
    1 + e^(x − 40), and below x = −47 it is lost to underflow.

    Args:
        q, k, v, window: as `flex_swat`'s.
        given: other arguments of `flex_swat`; logit_bias, activation and backend are replaced.

    Returns:
        `[B, H, L, D]`, as `flex_swat(..., activation="softmax")`.
    """
    given |= {"logit_bias": DEEP, "activation": "sigmoid", "backend": "auto"}
    sums = flex_swat(q, k, F.pad(F.pad(v, (0, 1), value=1.0), (0, LANES - 1)), window, **given)
    return sums[..., : v.shape[-1]] / sums[..., v.shape[-1], None]
