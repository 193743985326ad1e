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

from swat_flex import tuned
from swat_flex.backends.banded import tiles
from swat_flex.backends.banded.tiles import Band, BandedConfig
from swat_flex.backends.operator import Gradients, define, empty_output, gradients_like
from swat_flex.operands import Operands
from swat_flex.problem import NO_HARDWARE_TANH, Problem
from swat_flex.tuned import Tunable


def supports(problem: Problem) -> str | None:
    """Say why `banded` cannot run this problem, or return None."""
    return NO_HARDWARE_TANH if problem.activation == "tanh-sigmoid" else None


_CPU_MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # public, missing in torch's types


@contextlib.contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Compute with IEEE float32 products and no autocast inside the operator, whatever holds outside."""
    matmul = {"cuda": torch.backends.cuda.matmul, "cpu": _CPU_MATMUL}.get(device_type)
    allowed = "ieee" if matmul is None else matmul.fp32_precision
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if matmul is not None and allowed not in ("ieee", "none"):
            stack.callback(setattr, matmul, "fp32_precision", allowed)
            matmul.fp32_precision = "ieee"
        yield


def _forward(operands: Operands) -> Tensor:
    q, k, v = operands.q, operands.k, operands.v
    out = empty_output(q, v.shape[3])
    band = Band(operands, tuned.lookup(FORWARD, operands.problem()) or tiles.configuration(operands.window))
    with exact_products(q.device.type):
        for part in band.head_slices():
            for blocks, span in band.segments():
                k_span, v_span = band.keys(k, part, span), band.keys(v, part, span)
                for rows in blocks:
                    q_rows = band.rows(q, part, rows)
                    total = band.buffer("total", q_rows.shape[0], q_rows.shape[1], v.shape[3])
                    for i, keys in enumerate(band.chunks(rows)):
                        local = slice(keys.start - span.start, keys.stop - span.start)
                        weights = band.weights(q_rows, k_span[:, local], part, rows, keys)
                        total.baddbmm_(weights, v_span[:, local], beta=min(i, 1))
                    to = out[part[0], band.q_heads(part), rows]
                    to.copy_(total.view(to.shape))
    return out


def _backward(grad: Tensor, operands: Operands, per_head: bool) -> Gradients:
    q, k, v, scale = operands.q, operands.k, operands.v, operands.scale
    dq, dk, dv, d_per_head = gradients_like(q, k, v, torch.zeros)
    band = Band(operands, tuned.lookup(BACKWARD, operands.problem()) or tiles.configuration(operands.window))
    per_tile: dict[int, list[Tensor]] = {}
    with exact_products(q.device.type):
        for part in band.head_slices():
            dk_sum, dv_sum = band.accumulator(dk, part), band.accumulator(dv, part)
            for blocks, span in band.segments():
                k_span, v_span = band.keys(k, part, span), band.keys(v, part, span)
                for rows in blocks:
                    q_rows, grad_rows = band.rows(q, part, rows), band.rows(grad, part, rows)
                    total = band.buffer("total", *q_rows.shape)
                    for i, keys in enumerate(band.chunks(rows)):
                        local = slice(keys.start - span.start, keys.stop - span.start)
                        k_keys, v_keys = k_span[:, local], v_span[:, local]
                        weights = band.weights(q_rows, k_keys, part, rows, keys)
                        band.add_keys(dv_sum[:, keys], weights, grad_rows)
                        dlogits = band.logit_gradient(weights, grad_rows, v_keys, part, rows, keys)
                        band.add_keys(dk_sum[:, keys], dlogits, q_rows, scale)
                        total.baddbmm_(dlogits, k_keys, beta=min(i, 1), alpha=scale)
                        if per_head:
                            of_tile = band.per_head_sums(dlogits, part, rows, keys)
                            per_tile.setdefault(band.q_heads(part).start, []).append(of_tile)
                    to = dq[part[0], band.q_heads(part), rows]
                    to.copy_(total.view(to.shape))
            if dk_sum.dtype != dk.dtype:
                dk[part].copy_(dk_sum.view(dk[part].shape))
                dv[part].copy_(dv_sum.view(dv[part].shape))
    for first, sums in per_tile.items():
        d_per_head[:, first : first + sums[0].shape[1]] = torch.stack(sums).sum(0)
    return dq, dk, dv, d_per_head


def tunables(problem: Problem) -> tuple[Tunable[BandedConfig], ...]:
    """List what a call of this problem looks up."""
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
        default=lambda problem: tiles.configuration(problem.window),
        files=(Path(__file__), Path(tiles.__file__)),
    )


FORWARD, BACKWARD = _tunable("forward"), _tunable("backward")

swat = define("banded", _forward, _backward)
