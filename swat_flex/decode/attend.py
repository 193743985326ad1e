"""`swat_decode` and `swat_prefill`: attention of new tokens to a `RingCache`."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from swat_flex import validation
from swat_flex.api import flex_swat
from swat_flex.backends import banded, cpp, triton
from swat_flex.decode.ring import RingCache, kept_first, take_tokens
from swat_flex.problem import Activation, Backend, Problem, Slopes

DecodeBackend = Literal["auto", "triton", "cpp", "banded"]
NAMES: tuple[str, ...] = get_args(DecodeBackend)
BACKENDS: dict[str, Any] = {"triton": triton, "cpp": cpp, "banded": banded}
MADE_FOR = {"cuda": "triton", "cpu": "cpp"}  # device to backend


def choose(step: Problem, backend: str = "auto") -> str:
    """Name the backend of a step: the one asked for, else the device's own where it supports the step, else banded.

    Raises:
        NotImplementedError: the one asked for by name cannot run the step; the message says why.
    """
    name = MADE_FOR.get(step.device.type, "banded") if backend == "auto" else backend
    reason = BACKENDS[name].supports(step)
    if reason is None:
        return name
    if backend != "auto":
        raise NotImplementedError(f"backend={backend!r}: {reason}")
    return "banded"


def swat_decode(
    q: Tensor,
    cache: RingCache,
    *,
    slopes: Slopes = "balanced",
    scale: float | None = None,
    logit_bias: Tensor | float | None = None,
    backend: DecodeBackend = "auto",
) -> Tensor:
    """Attention of the newest tokens, whose keys and values have already been appended: the last rows of `flex_swat`.

    Row t is position length − T + t and sees the `window` keys up to itself. A row of the batch with fewer tokens than
    that gives 0 there. A slot that no query of its batch row sees is not read on a CPU or by the triton kernel, and has
    no influence elsewhere, NaN included; a NaN or infinite value that one of T queries sees may reach the others.

    >>> cache = RingCache(batch=1, heads=2, window=4, head_dim=8)
    >>> cache.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
    >>> swat_decode(torch.randn(1, 6, 1, 8), cache).shape
    torch.Size([1, 6, 1, 8])

    Args:
        q: `[B, Hq, T, D]` in the cache's dtype (cast to it under autocast), T ≤ cache.queries; Hq a multiple of the
            cache's heads.
        cache: with the T tokens appended.
        slopes, scale, logit_bias: as in `flex_swat`.
        backend: "triton", one kernel or two on a GPU; "cpp", one on a CPU; "banded", plain PyTorch operators on any
            device. "auto" is triton on CUDA and cpp on a CPU, where they support the step, else banded.

    Returns:
        `[B, Hq, T, Dv]` in q's dtype, its axes in memory in q's order. Sums are float32, float64 for float64.

    Raises:
        TypeError, ValueError: an argument that breaks a rule above.
        NotImplementedError: a backend asked for by name that cannot run the call; the message says why.
        RuntimeError: q, slopes or logit_bias requires a gradient, which decoding does not have (`swat_prefill` does).
    """
    _check_cache(cache)
    q = cache.cast(q)
    _check_queries(q, cache)
    terms = validation.resolve_logit_terms(q, slopes, scale, logit_bias)
    validation.check_name("backend", backend, NAMES)
    if q.shape[2] > cache.queries:
        raise ValueError(f"q: expected at most the cache's queries = {cache.queries} new tokens, got {q.shape[2]}")
    if wanted := _needs_grad(q=q, slopes=slopes, logit_bias=logit_bias):
        raise RuntimeError(
            f"{wanted}: expected no gradient to be required, got requires_grad=True: decode under torch.no_grad() or "
            "torch.inference_mode(), or use swat_prefill, which has one"
        )
    return _attend_ring(q, cache, *terms, backend)


def _attend_ring(
    q: Tensor, cache: RingCache, slopes: Tensor | None, scale: float, logit_bias: Tensor | None, backend: str
) -> Tensor:
    step = Problem.of_step(q, cache.keys, cache.values, cache.window, slopes, logit_bias)
    decode = BACKENDS[choose(step, backend)].swat_decode
    out: Tensor = decode(q, cache.keys, cache.values, cache.length, slopes, logit_bias, cache.window, scale)
    return out


def _needs_grad(**tensors: object) -> str | None:
    """Name the first that requires a gradient where gradients are enabled."""
    wanted = (name for name, x in tensors.items() if isinstance(x, Tensor) and x.requires_grad)
    return next(wanted, None) if torch.is_grad_enabled() else None


def swat_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: RingCache,
    *,
    mask: Tensor | None = None,
    slopes: Slopes = "balanced",
    scale: float | None = None,
    logit_bias: Tensor | float | None = None,
    activation: Activation = "sigmoid",
    backend: Backend = "auto",
) -> Tensor:
    """Attention of a chunk of any length to the cached keys and to itself; then the chunk is appended.

    A prompt may come in chunks of any sizes: the results are those of one call. Distances count kept tokens, so padding
    at either side, or anywhere, makes no difference. Gradients flow through the chunk, not through the cache. What
    `swat_decode` can do, it does: at most cache.queries tokens, no mask, no gradient, the sigmoid, backend "auto".

    Args:
        q: `[B, Hq, T, D]` in the cache's dtype (cast to it under autocast); Hq a multiple of the cache's heads.
        k: `[B, heads, T, D]`.
        v: `[B, heads, T, Dv]`.
        cache: what came before; the chunk's last tokens are appended to it.
        mask: bool `[B, T]`, False for padding: it sees nothing, is seen by nothing, its output rows are exactly 0.
        slopes, scale, logit_bias, activation, backend: as in `flex_swat`.

    Returns:
        `[B, Hq, T, Dv]` in q's dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flex_swat` and `RingCache.append`.
    """
    _check_cache(cache)
    q, k, v = cache.cast(q), cache.cast(k), cache.cast(v)
    _check_queries(q, cache)
    cache.check(k, v, mask)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q: expected k's {k.shape[2]} tokens, got {q.shape[2]}")
    if mask is None and backend == "auto" and activation == "sigmoid" and q.shape[2] <= cache.queries:
        terms = validation.resolve_logit_terms(q, slopes, scale, logit_bias)
        if _needs_grad(q=q, k=k, v=v, slopes=slopes, logit_bias=logit_bias) is None:
            cache.append(k, v)
            return _attend_ring(q, cache, *terms, backend)
    keys, values, ids = _joined(k, v, cache, mask)
    if mask is not None:
        order = kept_first(mask.logical_not())  # skipped tokens first, so the kept ones end together
        q = take_tokens(torch.where(mask[:, None, :, None], q, 0), order)
    with torch.autocast(q.device.type, enabled=False):  # as swat_decode, which computes in the cache's dtype
        out = flex_swat(
            q, keys, values, cache.window, slopes=slopes, scale=scale, logit_bias=logit_bias, document_ids=ids,
            activation=activation, backend=backend,
        )  # fmt: skip
    if mask is not None:
        out = torch.where(mask[:, None, :, None], take_tokens(out, order.argsort(1)), 0)
    cache.append(k, v, mask)
    return out


def _joined(k: Tensor, v: Tensor, cache: RingCache, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(keys, values, document ids) of the window − 1 cached tokens and the chunk, `[B, ·, window − 1 + T, ·]`.

    The kept tokens of a row end at the last column with no gap between them; ids are −1 in the columns before, whose
    contents are zeros, so that whatever an empty slot holds cannot reach a tile.
    """
    past, tokens = cache.window - 1, k.shape[2]
    column = torch.arange(past + tokens, device=k.device)
    length = cache.length[:, None]
    before = length - past + column[:past]  # positions [B, past]
    keys, values = (
        torch.cat((take_tokens(ring, before % cache.slots), new), 2)
        for ring, new in ((cache.keys, k), (cache.values, v))
    )
    if mask is None:
        live = length - past + column >= 0
    else:
        kept = mask.sum(1, keepdim=True)
        skipped = tokens - kept
        order = kept_first(mask.logical_not())
        chunk = torch.where(column[:tokens] < skipped, column[past:] - skipped, past + order)
        source = torch.cat((column[:past] - skipped, chunk), 1)
        live = (source >= 0) & (length + kept - past - tokens + column >= 0)
        keys, values = (take_tokens(x, source.clamp(min=0)) for x in (keys, values))
    shown = live[:, None, :, None]
    return torch.where(shown, keys, 0), torch.where(shown, values, 0), live.to(torch.int32) - 1


def _check_cache(cache: RingCache) -> None:
    if not isinstance(cache, RingCache):
        raise TypeError(f"cache: expected a RingCache, got {type(cache).__name__}")


def _check_queries(q: Tensor, cache: RingCache) -> None:
    validation.check_tensor("q", q)
    batch, heads, _, head_dim = cache.keys.shape
    if q.dim() != 4 or (q.shape[0], q.shape[3]) != (batch, head_dim):
        raise ValueError(f"q: expected shape [{batch}, Hq, T, {head_dim}], got {list(q.shape)}")
    if q.shape[1] < 1 or q.shape[1] % heads:
        raise ValueError(f"q: expected a positive multiple of the cache's {heads} heads, got {q.shape[1]}")
    validation.check_like("q", q, cache.keys, "the cache's")
