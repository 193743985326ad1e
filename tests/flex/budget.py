"""The error budget of the suite: what a low-precision matrix product may lose, and no more."""

from __future__ import annotations

import torch
from torch import Tensor

from swat_flex import balanced_alibi_slopes, naive_swat
from swat_flex.window import Window


def exact(q: Tensor, k: Tensor, v: Tensor, window: object, **options: object) -> Tensor:
    """`naive_swat` in float64."""
    wide = {name: x.double() if _is_float(x) else x for name, x in options.items()}
    return naive_swat(q.double(), k.double(), v.double(), window, **wide)


def rough(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: object,
    *,
    slopes: Tensor | str | None = "balanced",
    logit_bias: Tensor | None = None,
    document_ids: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor:
    """float32 with the weights and the output rounded to q's dtype, as a product with float32 sums does."""
    heads, (q_len, kv_len) = q.shape[1], (q.shape[2], k.shape[2])
    k, v = (x.repeat_interleave(heads // k.shape[1], 1).float() for x in (k, v))
    i, j = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
    x = q.float() @ k.mT * q.shape[3] ** -0.5
    if isinstance(slopes, str):
        slopes = balanced_alibi_slopes(heads)
    if slopes is not None:
        x = x + slopes[:, None, None] * (i - j).abs()
    if logit_bias is not None:
        x = x + logit_bias[:, None, None]
    visible = Window.of(window).sees(i - j)
    if document_ids is not None:
        ids = document_ids.expand(q.shape[0], kv_len)[:, None]
        own = ids[..., kv_len - q_len :, None]
        visible = visible & (own == ids[..., None, :]) & (own >= 0)
    weights = x.masked_fill(~visible, -1e30).softmax(-1) if activation == "softmax" else x.sigmoid()
    return ((weights * visible).to(q.dtype).float() @ v).to(q.dtype)


def assert_within_budget(actual: Tensor, exact: Tensor, rough: Tensor) -> None:
    """Largest and root-mean-square error against those of `rough` and of one rounding of the exact result."""
    info = torch.finfo(actual.dtype)
    band = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps
    error, allowed = (actual.double() - exact).abs(), (rough.double() - exact).abs()
    assert actual.isfinite().all()
    worst, limit = error.max().item(), 2 * (allowed.max() + band.max()).item()
    assert worst <= limit, f"largest error {worst:.3e}, allowed {limit:.3e}"
    rms, limit = _rms(error), 1.25 * _rms(allowed) + 0.5 * _rms(band)
    assert rms <= limit, f"RMS error {rms:.3e}, allowed {limit:.3e}"


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
