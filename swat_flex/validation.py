"""Every rule on the arguments of `flex_swat` that does not depend on a backend, and what the arguments stand for.

A message is `argument: the rule, the value received`. TypeError for the wrong kind, ValueError for shapes, dtypes,
devices and ranges. No rule reads a tensor's values, so nothing synchronises a device.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from swat_flex.operands import Operands
from swat_flex.positions import per_head_dtype, slopes_of
from swat_flex.problem import Activation, Backend, Slopes, WindowLike
from swat_flex.window import Window

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ID_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8)
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
BACKENDS: tuple[str, ...] = get_args(Backend)
MAX_HEAD_DIM = 256


def resolve(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: WindowLike,
    slopes: Slopes = "balanced",
    scale: float | None = None,
    logit_bias: Tensor | float | None = None,
    document_ids: Tensor | None = None,
    activation: str = "sigmoid",
    backend: str = "auto",
) -> Operands:
    """Check every argument of `flex_swat` and return what they stand for; raise for the first rule broken.

    Under autocast q, k and v are cast to its dtype first, as `scaled_dot_product_attention` does; float64 stays.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected shape [B, H, L, D], got {list(x.shape)}")
    if autocasts(q.device.type):
        q, k, v = autocast(q), autocast(k), autocast(v)
    _check_tensors(q, k, v)
    _check_window(window)
    logit_terms = resolve_logit_terms(q, slopes, scale, logit_bias)
    if document_ids is not None:
        _check_document_ids(document_ids, k)
    check_name("activation", activation, ACTIVATIONS)
    check_name("backend", backend, BACKENDS)
    if q.dtype == torch.float64 and q.device.type != "cpu" and backend != "naive":
        raise ValueError(f"q: expected float64 on a CPU only (or backend='naive'), got it on {q.device}")
    head_slopes, scale, head_bias = logit_terms
    return Operands(q, k, v, head_slopes, head_bias, document_ids, Window.of(window), scale, activation)


def resolve_logit_terms(
    q: Tensor, slopes: Slopes, scale: float | None, logit_bias: Tensor | float | None
) -> tuple[Tensor | None, float, Tensor | None]:
    """Check slopes, scale and logit_bias against the queries q, and return (slopes, scale, logit_bias) as operands."""
    heads = q.shape[1]
    if isinstance(slopes, Tensor):
        _check_per_head("slopes", slopes, q)
    elif isinstance(slopes, str):
        check_name("slopes", slopes, ("balanced", "alibi"))
    elif slopes is not None:
        raise TypeError(f"slopes: expected 'balanced', 'alibi', a torch.Tensor or None, got {type(slopes).__name__}")
    if scale is not None and not _is_number(scale):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    if isinstance(logit_bias, Tensor):
        _check_per_head("logit_bias", logit_bias, q)
    elif logit_bias is not None:
        if not _is_number(logit_bias):
            raise TypeError(f"logit_bias: expected a float, a torch.Tensor or None, got {type(logit_bias).__name__}")
        logit_bias = torch.full((heads,), logit_bias, dtype=per_head_dtype(q), device=q.device)
    return slopes_of(slopes, heads, q), q.shape[3] ** -0.5 if scale is None else float(scale), logit_bias


def autocast(x: Tensor) -> Tensor:
    """Cast x to autocast's dtype where autocast is on for its device; float64 stays."""
    device_type = x.device.type
    if x.dtype == torch.float64 or not autocasts(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def autocasts(device_type: str) -> bool:
    """Tell whether autocast is on for a type of device; False for types that it does not know."""
    if device_type == "meta":
        return False
    # torch.compile knows autocast's types alone, and cannot trace the question in torch 2.11.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"q: expected dtype float32, bfloat16, float16 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        check_like(name, x, q, "q's")
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    if k.shape[0] != batch:
        raise ValueError(f"k: expected q's batch size {batch}, got {k.shape[0]}")
    if k.shape[3] != head_dim:
        raise ValueError(f"k: expected q's head dimension {head_dim}, got {k.shape[3]}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected k's [B, Hkv, Lk] = {list(k.shape[:3])}, got {list(v.shape[:3])}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dimension from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if not 1 <= v.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"v: expected a head dimension from 1 to {MAX_HEAD_DIM}, got {v.shape[3]}")
    if kv_heads < 1:
        raise ValueError(f"k: expected at least 1 head, got {kv_heads}")
    if q_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"q: expected a positive multiple of k's {kv_heads} heads, got {q_heads}")
    if q_len > kv_len:
        raise ValueError(f"q: expected at most k's {kv_len} tokens, got {q_len}")


def _check_window(window: Any) -> None:
    if window is None:
        return
    if isinstance(window, tuple):
        if len(window) != 2:
            raise ValueError(f"window: expected a tuple of 2 sides (left, right), got {len(window)} values")
        for side, reach in zip(("left", "right"), window, strict=True):
            if reach is not None and not _is_int(reach):
                raise TypeError(f"window: expected an int or None as its {side} side, got {type(reach).__name__}")
            if reach is not None and reach < 0:
                raise ValueError(f"window: expected its {side} side to be at least 0, got {reach}")
        return
    if not _is_int(window):
        raise TypeError(f"window: expected an int, a tuple (left, right) or None, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window: expected at least 1 key per query (its own), got {window}")


def _check_per_head(name: str, x: Tensor, q: Tensor) -> None:
    dtype = per_head_dtype(q)
    if x.dim() != 1 or x.shape[0] != q.shape[1]:
        raise ValueError(f"{name}: expected shape [Hq] = [{q.shape[1]}], got {list(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype} (q is {q.dtype}), got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")


def _check_document_ids(ids: Any, k: Tensor) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"document_ids: expected a torch.Tensor or None, got {type(ids).__name__}")
    if ids.dtype not in ID_DTYPES:
        raise ValueError(f"document_ids: expected a signed integer dtype, got {ids.dtype}")
    batch, kv_len = k.shape[0], k.shape[2]
    shape = ids.shape
    if not (len(shape) in (1, 2) and shape[-1] == kv_len and (len(shape) == 1 or shape[0] == batch)):
        raise ValueError(f"document_ids: expected shape [{batch}, {kv_len}] or [{kv_len}], got {list(shape)}")
    if ids.device != k.device:
        raise ValueError(f"document_ids: expected q's device {k.device}, got {ids.device}")


def check_tensor(argument: str, value: Any) -> None:
    """Raise TypeError unless the value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor, got {type(value).__name__}")


def check_like(argument: str, x: Tensor, other: Tensor, whose: str) -> None:
    """Raise ValueError unless x has the dtype and the device of another tensor."""
    if x.dtype != other.dtype:
        raise ValueError(f"{argument}: expected {whose} dtype {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{argument}: expected {whose} device {other.device}, got {x.device}")


def check_name(argument: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise unless the value is a str and one of those allowed."""
    if not isinstance(value, str):
        raise TypeError(f"{argument}: expected a str, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
