"""Backend `cpp`: fused kernels for a CPU's vectors, built on first use.

Queries are the vectors' lanes: a block's queries lie transposed, and a group of keys times a strip of queries stays in
registers from the product over σ to the weights. Tiles of weights live in the caches; nothing of them is stored. All
types are computed in float32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swat_flex import tuned
from swat_flex.backends.cpp import build, library
from swat_flex.backends.operator import Gradients, define, empty_output, gradients_like
from swat_flex.operands import Operands
from swat_flex.problem import NO_HARDWARE_TANH, Problem
from swat_flex.tuned import Tunable


@dataclass(frozen=True, slots=True)
class CppConfig:
    """How a call is cut.

    block: queries of a block; a multiple of 16, the lanes of the widest vectors.
    tile: keys of a tile; a multiple of 6, the rows of the register block.
    """

    block: int = 64
    tile: int = 96

    def is_valid(self) -> bool:
        return 16 <= self.block <= 256 and self.block % 16 == 0 and 6 <= self.tile <= 384 and self.tile % 6 == 0


def supports(problem: Problem) -> str | None:
    """Say why `cpp` cannot run this problem, or return None; the first question builds the library."""
    if problem.device.type != "cpu":
        return f"its kernels are for a CPU, got device {problem.device.type!r}"
    if problem.activation == "tanh-sigmoid":
        return NO_HARDWARE_TANH
    if problem.activation != "sigmoid":
        return f"its kernels have no activation={problem.activation!r}"
    if problem.dtype not in library.TYPES:
        return f"its kernels compute in float32, got {problem.dtype}"
    reason: str | None = library.trouble()
    return reason


def _forward(operands: Operands) -> Tensor:
    out = empty_output(operands.q, operands.v.shape[3])
    config = tuned.lookup(FORWARD, operands.problem()) or FORWARD.default(operands.problem())
    _run("swat_forward", operands, config, {"out": out})
    return out


def _backward(grad: Tensor, operands: Operands, per_head: bool) -> Gradients:
    dq, dk, dv, sums = gradients_like(operands.q, operands.k, operands.v)
    config = tuned.lookup(BACKWARD, operands.problem()) or BACKWARD.default(operands.problem())
    tensors = {"grad": grad, "dq": dq, "dk": dk, "dv": dv}
    _run("swat_backward", operands, config, tensors, sums if per_head else None)
    return dq, dk, dv, sums


def _run(
    function: str, operands: Operands, config: CppConfig, tensors: dict[str, Tensor], sums: Tensor | None = None
) -> None:
    q, k, v = operands.q, operands.k, operands.v
    left, right = operands.window.clamped(q.shape[2], k.shape[2])
    slopes, logit_bias = (None if x is None else x.contiguous() for x in (operands.slopes, operands.logit_bias))
    ids = None if operands.document_ids is None else _as_int32(operands.document_ids)
    library.run(
        function,
        {"q": q, "k": k, "v": v, **tensors},
        {"slopes": slopes, "logit_bias": logit_bias, "ids": ids, "per_head": sums},
        ids_stride=ids.shape[1] if ids is not None and ids.dim() == 2 else 0,
        left=left,
        right=right,
        block=config.block,
        tile=config.tile,
        scale=operands.scale,
    )


def _as_int32(ids: Tensor) -> Tensor:
    """Ids that int32 holds and that are equal where these are, negative where these are; contiguous."""
    if ids.dtype == torch.int64:
        lowest, highest = ids.aminmax()
        if lowest < -(2**31) or highest >= 2**31:
            _, ids = torch.unique(ids.clamp(min=-1), return_inverse=True)
            ids = ids - int(lowest < 0)
    return ids.to(torch.int32).contiguous()


def tunables(problem: Problem) -> tuple[Tunable[CppConfig], ...]:
    """List what a call of this problem looks up."""
    return (FORWARD, BACKWARD) if problem.needs_grad else (FORWARD,)


def _tunable(name: str, default: CppConfig) -> Tunable[CppConfig]:
    return Tunable(
        name=f"cpp.{name}",
        config_type=CppConfig,
        choices=lambda problem: {"block": (16, 32, 48, 64, 96, 128, 192), "tile": (48, 96, 144, 192)},
        is_valid=CppConfig.is_valid,
        default=lambda problem: default,
        files=(Path(__file__), Path(build.__file__), *sorted(build.SOURCES.iterdir())),
    )


# Long tiles are faster by 4%; the sums that make dq lose too much to rounding in them.
FORWARD, BACKWARD = _tunable("forward", CppConfig(tile=192)), _tunable("backward", CppConfig())

swat = define("cpp", _forward, _backward)
