"""Cross-entropy whose logits never exist all at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**24  # in a chunk, forward and again backward: 64 MiB in float32
IGNORED = -100  # target of a token that does not count


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Mean (or sum) over tokens of −log softmax(weight · hidden)[target], in nats.

    Logits are made a chunk of tokens at a time and made again in the backward pass, so the memory beyond inputs and
    gradients is a few times chunk · V, whatever the number of tokens.

    Args:
        hidden: `[..., D]`.
        weight: `[V, D]`, the output head.
        targets: int64 `[...]`; −100 does not count.
        chunk: tokens at once; None takes what makes 2^24 logits.
        reduction: "mean", or "sum" for a caller who divides by the tokens of several batches.

    Returns:
        A float32 scalar (float64 for float64); where no token counts, the mean is NaN and the sum 0.

    Raises:
        ValueError: targets of another shape than hidden's tokens, chunk < 1, or an unknown reduction.
    """
    return head_cross_entropy(
        hidden, functools.partial(F.linear, weight=weight), targets, weight.shape[0], chunk=chunk, reduction=reduction
    )


def head_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    vocabulary: int,
    *,
    chunk: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """`chunked_cross_entropy` of the logits that a head makes, whatever it does: a module with hooks or adapters too.

    Args:
        hidden, targets, chunk, reduction: as in `chunked_cross_entropy`.
        head: from `[N, D]` to logits `[N, V]`; called once per chunk, and once more in the backward pass.
        vocabulary: V.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"targets: expected hidden's tokens {list(hidden.shape[:-1])}, got {list(targets.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1 token, got {chunk}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    chunk = max(1, CHUNK_LOGITS // vocabulary) if chunk is None else chunk
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    tokens = hidden.shape[0]
    if tokens <= chunk:
        total = _sum(hidden, head, targets)
    else:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for rows, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
            total = total + checkpoint(_sum, rows, head, wanted, use_reentrant=False)
    return total if reduction == "sum" else total / (targets != IGNORED).sum()


def _sum(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
