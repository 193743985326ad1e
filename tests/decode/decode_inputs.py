"""Inputs of the decoding tests."""

import torch

from swat_flex import RingCache


def inputs(length, group=2, dtype=torch.float32, batch=2, heads=2, head_dim=16, value_dim=24):
    q = torch.randn(batch, heads * group, length, head_dim).to(dtype)
    k = torch.randn(batch, heads, length, head_dim).to(dtype)
    return q, k, torch.randn(batch, heads, length, value_dim).to(dtype)


def cache_for(k, v, window, queries=1):
    return RingCache(k.shape[0], k.shape[1], window, k.shape[3], v.shape[3], k.dtype, queries=queries)


def some_options(q):
    """Slopes of both signs, small enough for any window, and a bias."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads = q.shape[1]
    return {"slopes": torch.linspace(-0.3, 0.1, heads, dtype=dtype), "logit_bias": torch.randn(heads, dtype=dtype) - 1}
