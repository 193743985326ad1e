"""Backend `banded`: SWAT in plain PyTorch operators, O(Lq·window) time, with a hand-written backward, on any device.

A block of query rows meets only the keys its window touches. The linear bias is already in the tile when the matrix
product of queries and keys is added to it, σ runs in place, a second product sums the values. A sigmoid has no
normaliser: wide windows are walked in chunks of keys that simply add, and the backward recomputes the tile from q and
k, so neither weights nor output nor a logsumexp are saved.

float16 and bfloat16 are computed in float32 and rounded once. float32 products stay IEEE whatever the user allows
elsewhere (TF32, bfloat16).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swat_flex import winners
from swat_flex.backends.banded import tiles
from swat_flex.backends.banded.tiles import Band, BandedConfig
from swat_flex.backends.operator import define, empty_output, per_head_dtype
from swat_flex.problem import SwatProblem
from swat_flex.window import Window
from swat_flex.winners import Call, Tunable


def supports(problem: SwatProblem) -> str | None:
    """Why `banded` cannot run this problem, or None."""
    if problem.activation == "tanh-sigmoid":
        return "activation='tanh-sigmoid' is a GPU's hardware tanh, which only the triton backend uses"
    return None


_CPU_MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # public, missing in torch's types


@contextlib.contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """IEEE float32 products and no autocast inside the operator, whatever holds outside."""
    matmul = {"cuda": torch.backends.cuda.matmul, "cpu": _CPU_MATMUL}.get(device_type)
    allowed = "ieee" if matmul is None else matmul.fp32_precision
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if matmul is not None and allowed not in ("ieee", "none"):
            stack.callback(setattr, matmul, "fp32_precision", allowed)
            matmul.fp32_precision = "ieee"
        yield


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    logit_bias: Tensor | None,
    document_ids: Tensor | None,
    window: Window,
    scale: float,
    activation: str,
) -> Tensor:
    out = empty_output(q, v.shape[3])
    call = Call.of(q, k, v, slopes, logit_bias, document_ids, window, activation)
    config = winners.lookup(FORWARD, call) or tiles.configuration(window)
    band = Band(q, k, v.shape[3], slopes, logit_bias, document_ids, window, scale, activation == "softmax", config)
    with exact_products(q.device.type):
        for group in band.groups():
            for blocks, span in band.segments():
                k_span, v_span = band.keys(k, group, span), band.keys(v, group, span)
                for rows in blocks:
                    q_rows = band.rows(q, group, rows)
                    total = band.buffer("total", q_rows.shape[0], q_rows.shape[1], v.shape[3])
                    for i, keys in enumerate(band.chunks(rows)):
                        local = slice(keys.start - span.start, keys.stop - span.start)
                        weights = band.weights(q_rows, k_span[:, local], group, rows, keys)
                        total.baddbmm_(weights, v_span[:, local], beta=min(i, 1))
                    to = out[group[0], band.q_heads(group), rows]
                    to.copy_(total.view(to.shape))
    return out


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    logit_bias: Tensor | None,
    document_ids: Tensor | None,
    window: Window,
    scale: float,
    activation: str,
    per_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    call = Call.of(q, k, v, slopes, logit_bias, document_ids, window, activation)
    config = winners.lookup(BACKWARD, call) or tiles.configuration(window)
    band = Band(q, k, v.shape[3], slopes, logit_bias, document_ids, window, scale, activation == "softmax", config)
    per_tile: dict[int, list[Tensor]] = {}
    with exact_products(q.device.type):
        for group in band.groups():
            dk_sum, dv_sum = band.accumulator(dk, group), band.accumulator(dv, group)
            for blocks, span in band.segments():
                k_span, v_span = band.keys(k, group, span), band.keys(v, group, span)
                for rows in blocks:
                    q_rows, grad_rows = band.rows(q, group, rows), band.rows(grad, group, rows)
                    total = band.buffer("total", *q_rows.shape)
                    for i, keys in enumerate(band.chunks(rows)):
                        local = slice(keys.start - span.start, keys.stop - span.start)
                        k_keys, v_keys = k_span[:, local], v_span[:, local]
                        weights = band.weights(q_rows, k_keys, group, rows, keys)
                        band.add_keys(dv_sum[:, keys], weights, grad_rows)
                        dlogits = band.logit_gradient(weights, grad_rows, v_keys, group, rows, keys)
                        band.add_keys(dk_sum[:, keys], dlogits, q_rows, scale)
                        total.baddbmm_(dlogits, k_keys, beta=min(i, 1), alpha=scale)
                        if per_head:
                            of_tile = band.per_head_sums(dlogits, group, rows, keys)
                            per_tile.setdefault(band.q_heads(group).start, []).append(of_tile)
                    to = dq[group[0], band.q_heads(group), rows]
                    to.copy_(total.view(to.shape))
            if dk_sum.dtype != dk.dtype:
                dk[group].copy_(dk_sum.view(dk[group].shape))
                dv[group].copy_(dv_sum.view(dv[group].shape))
    d_per_head = torch.zeros(2, q.shape[1], dtype=per_head_dtype(q), device=q.device)
    for first, sums in per_tile.items():
        d_per_head[:, first : first + sums[0].shape[1]] = torch.stack(sums).sum(0)
    return dq, dk, dv, d_per_head


def configuration(problem: SwatProblem) -> BandedConfig:
    """What a call runs with where nothing was measured."""
    return tiles.configuration(problem.window)


def tunables(problem: SwatProblem) -> tuple[Tunable[BandedConfig], ...]:
    """What a call of this problem looks up."""
    return (FORWARD, BACKWARD) if problem.needs_grad else (FORWARD,)


def _tunable(name: str) -> Tunable[BandedConfig]:
    return Tunable(
        name=f"banded.{name}",
        config_type=BandedConfig,
        choices=lambda problem: {
            "block": (32, 48, 64, 80, 96, 128, 160, 192, 256),
            "tile": tuple(2**n for n in range(16, 24)),
            "segment": (4, 16, 64),
        },
        is_valid=BandedConfig.is_valid,
        default=configuration,
        files=(Path(__file__), Path(tiles.__file__)),
    )


FORWARD, BACKWARD = _tunable("forward"), _tunable("backward")

swat = define("banded", _forward, _backward)
