"""Whether a call is being traced, and whether a tensor made now may be kept for later calls."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced(x: Tensor) -> bool:
    """Tell whether a call on x becomes part of a caller's graph or runs on fake tensors: sizes may be symbols."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def can_cache(x: Tensor) -> bool:
    """Tell whether a tensor made now may be kept for later calls.

    Not under a mode that hands out its own tensors, not an inference tensor (training cannot save it), not memory of a
    CUDA graph under capture (its replay overwrites it).
    """
    return type(x) is Tensor and not x.is_inference() and not is_capturing(x.device)


def is_capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, which will read the tensors that it meets now again and again."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
