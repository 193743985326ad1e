"""Sampling: the next token from logits, and the loop that generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from swat_flex.decode import RingCache


class Decoder(Protocol):
    """Protocol of a model that `generate` can run, such as `SwatTransformer`."""

    def __call__(self, tokens: Tensor, *, cache: Any, mask: Tensor | None = None, logits_to_keep: int) -> Tensor: ...

    def new_cache(self, batch: int, *, capacity: int) -> Sequence[RingCache]: ...


def generate(
    model: Decoder,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    mask: Tensor | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
    stream: Callable[[Tensor], None] | None = None,
    prefill: int = 4096,
) -> Tensor:
    """Continue each row of a batch, token by token.

    With windows the memory is constant: the cache keeps a window of keys per layer, the prompt is read in chunks. A
    layer with window None keeps all keys.

    Args:
        model: in the mode and under the autocast that the caller chose.
        tokens: int64 `[B, T]`, T ≥ 1. Prompts of different lengths are padded on the left.
        max_new_tokens: at least 0.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw from the k most likely alone.
        top_p: draw from the fewest tokens whose probabilities reach p, 0 < p ≤ 1.
        mask: bool `[B, T]`, False for padding.
        stop: a token that ends its row, which goes on with it; all rows ended end the loop.
        generator: of the draws, on the tokens' device; None is torch's global one.
        stream: called with the `[B]` tokens of each step, as they come.
        prefill: tokens of the prompt read at once.

    Returns:
        int64 `[B, T + N]`, N ≤ max_new_tokens: prompt and continuation.

    Raises:
        ValueError: an argument that breaks a rule above.
    """
    _check(tokens, max_new_tokens, temperature, top_k, top_p, mask, prefill)
    with torch.no_grad():
        cache = model.new_cache(tokens.shape[0], capacity=tokens.shape[1] + max_new_tokens)
        logits = tokens.new_empty(0)
        for start in range(0, tokens.shape[1], prefill):
            part = slice(start, start + prefill)
            shown = None if mask is None else mask[:, part]
            logits = model(tokens[:, part], cache=cache, mask=shown, logits_to_keep=1)
        pieces = [tokens]
        ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        for step in range(max_new_tokens):
            if step:
                logits = model(pieces[-1], cache=cache, logits_to_keep=1)
            new = sample(logits[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if stop is not None:
                new = torch.where(ended, stop, new)
                ended = ended | (new == stop)
            if stream is not None:
                stream(new)
            pieces.append(new[:, None])
            if stop is not None and bool(ended.all()):
                break
        return torch.cat(pieces, 1)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row, `[B]` int64, from logits `[B, V]`; arguments as in `generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, dim=-1)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # the tokens before already reach top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check(
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    mask: Tensor | None,
    prefill: int,
) -> None:
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or tokens.shape[1] < 1:
        raise ValueError(
            f"tokens: expected int64 [B, T] with T at least 1, got {tokens.dtype} of shape {list(tokens.shape)}"
        )
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("top_k", top_k, 1), ("prefill", prefill, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number, at least 0, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected 0 < top_p ≤ 1, got {top_p}")
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
        expected = f"bool of tokens' shape {list(tokens.shape)}"
        raise ValueError(f"mask: expected {expected}, got {mask.dtype} of shape {list(mask.shape)}")
