"""Backend `flex`: SWAT through FlexAttention, lowered by torch.compile to Triton on CUDA and to C++ on a CPU.

Each call is padded to whole tiles, and its lengths to one of a few sizes, so that few programs serve all lengths;
window, lengths, slopes and document ids enter as tensors and never cause a compilation. For one combination of batch
size, heads, head dimensions, dtype, scale and flags, lengths up to 2^n tokens take at most n − 6 programs on a CPU
and 4·(n − 8) on CUDA, where padding costs more; with fewer queries than keys, that many for each number of tiles of
keys. A window beyond 2^15 tokens adds one per doubling, a layout, requires_grad or a mode of torch another factor.

A CPU computes in float32 whatever the dtype, forward only. Inside the caller's own torch.compile the CPU program is
one opaque operator; on CUDA FlexAttention becomes part of the caller's graph, one for all symbolic lengths.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_flex import modifiers, winners
from swat_flex.backends.flex import blocks as block_lists
from swat_flex.backends.flex import config as configs
from swat_flex.backends.flex.blocks import TILE, band, kept_band, padded_tiles
from swat_flex.backends.flex.config import FlexConfig, choose
from swat_flex.backends.operator import empty_output
from swat_flex.problem import SwatProblem
from swat_flex.window import Window
from swat_flex.winners import Call, Tunable

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked here: torch 2.11 cannot trace the question


def supports(problem: SwatProblem) -> str | None:
    """Why `flex` cannot run this problem, or None."""
    if problem.activation == "tanh-sigmoid":
        return "activation='tanh-sigmoid' is a GPU's hardware tanh, which only the triton backend uses"
    if problem.dtype == torch.float64:
        return "FlexAttention does not compute in float64"
    if problem.kv_len > 2**24:
        return f"its distances are exact up to 2^24 tokens, got {problem.kv_len}"
    if problem.device_type == "cpu":
        return "FlexAttention has no backward on a CPU; call it under torch.no_grad()" if problem.needs_grad else None
    if problem.device_type != "cuda":
        return f"FlexAttention is lowered for CPU and CUDA here, not for {problem.device_type}"
    if not _HAS_TRITON:
        return "FlexAttention on CUDA needs Triton, which is not installed"
    if problem.dtype == torch.float16 and problem.needs_grad and problem.activation == "sigmoid":
        return "its backward holds g · Σσ in float16, which overflows for wide windows; train in bfloat16"
    return None


def configuration(problem: SwatProblem) -> FlexConfig | None:
    """What a call runs with where nothing was measured; None on a CPU, whose C++ template leaves nothing to choose."""
    if problem.device_type == "cpu":
        return None
    return _default(problem)


def tunables(problem: SwatProblem) -> tuple[Tunable[FlexConfig], ...]:
    """What a call of this problem looks up."""
    return () if problem.device_type == "cpu" else (FLEX,)


def _default(problem: SwatProblem) -> FlexConfig:
    return choose(problem.head_dim, problem.value_dim, problem.dtype)


FLEX = Tunable(
    name="flex",
    config_type=FlexConfig,
    choices=configs.choices,
    is_valid=FlexConfig.is_valid,
    default=_default,
    files=tuple(Path(str(file)) for file in (__file__, block_lists.__file__, configs.__file__, modifiers.__file__)),
    joint=True,
)


def swat(
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
    """`[B, Hq, Lq, Dv]` from validated arguments; slopes and logit_bias are `[Hq]`."""
    softmax = activation == "softmax"
    if q.device.type == "cpu":
        out: Tensor = _on_cpu(q, k, v, slopes, logit_bias, document_ids, window.left, window.right, scale, softmax)
        return out
    if q.shape[0] == 0 or q.shape[2] == 0:
        return empty_output(q, v.shape[3])
    with torch.autocast(q.device.type, enabled=False):
        return _on_cuda(q, k, v, slopes, logit_bias, document_ids, window, scale, softmax)


@torch.library.custom_op(
    "swat_flex::flex",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? slopes, Tensor? logit_bias, Tensor? document_ids, "
    "SymInt? left, SymInt? right, float scale, bool softmax) -> Tensor",
)
def _on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    logit_bias: Tensor | None,
    document_ids: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softmax: bool,
) -> Tensor:
    out = empty_output(q, v.shape[3])
    if out.numel() == 0:
        return out
    q_len, kv_len = q.shape[2], k.shape[2]
    q_pad, kv_pad = (padded_tiles(length, per_doubling=1) * TILE - length for length in (q_len, kv_len))
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        # Copies, also where nothing is padded: tensors of inference mode would ask for programs of their own.
        padded_q = F.pad(q.float(), (0, 0, 0, q_pad))
        if softmax:
            k, v = F.pad(k.float(), (0, 0, 0, kv_pad)), F.pad(v.float(), (0, 0, 0, kv_pad))
        else:
            k, v = modifiers.with_extra_key(k.float(), v.float(), kv_len + kv_pad + TILE)
        slopes, logit_bias = (x if x is None else x.detach().clone() for x in (slopes, logit_bias))
        lengths, window = (q_len, kv_len), Window(left, right)
        result = _run(padded_q, k, v, slopes, logit_bias, document_ids, window, lengths, scale, softmax, None)
    return out.copy_(result[:, :, :q_len])


@_on_cpu.register_fake
def _(q, k, v, slopes, logit_bias, document_ids, left, right, scale, softmax):  # type: ignore[no-untyped-def]
    return empty_output(q, v.shape[3])


def _on_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    logit_bias: Tensor | None,
    document_ids: Tensor | None,
    window: Window,
    scale: float,
    softmax: bool,
) -> Tensor:
    """FlexAttention needs whole tiles (a ragged end gives NaN gradients) and head dimensions of at least 16."""
    q_len, kv_len, head_dim, value_dim = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    config = choose(head_dim, value_dim, q.dtype)
    if not _is_traced(q):
        backward = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, slopes, logit_bias)
        )
        activation = "softmax" if softmax else "sigmoid"
        call = Call.of(q, k, v, slopes, logit_bias, document_ids, window, activation, backward)
        config = winners.lookup(FLEX, call) or config
        config = config.fitting(window, q_len, kv_len, document_ids is not None, softmax)
    q = _padded(q, q_len, max(16, head_dim))
    k, v = _padded(k, kv_len, max(16, head_dim)), _padded(v, kv_len, max(16, value_dim))
    out = _run(q, k, v, slopes, logit_bias, document_ids, window, (q_len, kv_len), scale, softmax, config)
    return out[:, :, :q_len, :value_dim]


def _padded(x: Tensor, length: int, width: int) -> Tensor:
    tiles = _traced_tiles(length) if _is_traced(x) else padded_tiles(length, per_doubling=4)
    return F.pad(x, (0, width - x.shape[3], 0, tiles * TILE - length))


def _traced_tiles(length: int) -> int:
    """Enough tiles; unless known to be whole, at least two and one to spare, so that no guard tells lengths apart."""
    return length // TILE if _is_known(length % TILE == 0) else length // TILE + 2


def _is_known(condition: bool) -> bool:
    """Whether a condition on lengths holds, and holds for every length that a symbol in it stands for."""
    if not torch.compiler.is_compiling() and isinstance(condition, bool):
        return condition  # in a trace a symbolic condition poses as a bool, and using it would guard on it
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _is_traced(x: Tensor) -> bool:
    """Whether a call on x becomes part of someone's graph, or runs on a tracer's fake tensors."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    logit_bias: Tensor | None,
    document_ids: Tensor | None,
    window: Window,
    lengths: tuple[int, int],
    scale: float,
    softmax: bool,
    config: FlexConfig | None,
) -> Tensor:
    """`[B, Hq, rows·TILE, Dv]` of padded q, k and v; `lengths` are the numbers of queries and keys before padding."""
    from swat_flex.backends.flex.programs import attend, compiled  # imports half of torch's compiler

    on_cpu = config is None
    tile, merged = (TILE, False) if config is None else (config.mask_block, config.contiguous)
    rows, columns = q.shape[2] // tile, k.shape[2] // tile
    inputs = [x for x in (q, k, v, slopes, logit_bias) if x is not None]
    backward = not on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if document_ids is not None:
        wide = torch.int64 if document_ids.dtype == torch.int64 else torch.int32
        document_ids = document_ids.expand(q.shape[0], lengths[1]).to(wide)
    find = band if document_ids is not None or _is_traced(q) else kept_band
    bounds, blocks = find(
        window, *lengths, rows, columns, q.device, document_ids,
        backward=backward, extra_key=on_cpu and not softmax, dense_shape=on_cpu,
        tile=tile, merged=merged,
    )  # fmt: skip
    if not _is_traced(q) or _is_known(lengths[0] % TILE == 0):  # FlexAttention wants it without symbols
        slopes, logit_bias = (x if x is None else by_query(x, q.shape[2]) for x in (slopes, logit_bias))
    if _is_traced(q):
        return attend(q, k, v, slopes, logit_bias, document_ids, bounds, blocks, scale, softmax, config)
    if document_ids is not None:
        document_ids = F.pad(document_ids, (0, columns * tile - lengths[1]), value=-1)
    tensors = [x if x is None else _canonical(x) for x in (q, k, v, slopes, logit_bias, document_ids)]
    key = (x if x is None else _described(x) for x in (*tensors, *blocks))
    return compiled(*key, scale, softmax, config)(*tensors, bounds, blocks, scale, softmax, config)


def by_query(x: Tensor, q_len: int) -> Tensor:
    """`[Hq, Lq]` where x needs a gradient: its atomic additions meet in one number per query, not in one per head."""
    return x[:, None].repeat(1, q_len) if x.requires_grad and torch.is_grad_enabled() else x


def _canonical(x: Tensor) -> Tensor:
    """x with the strides of a contiguous tensor, or of one whose heads and tokens are exchanged; else a copy."""
    if x.stride() == _strides(x.shape):
        return x
    if x.dim() == 4 and x.transpose(1, 2).stride() == _strides(x.transpose(1, 2).shape):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape[i + 1 :].numel() for i in range(len(shape)))


def _described(x: Tensor) -> tuple[object, ...]:
    """What torch.compile binds a program to, of one input."""
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.is_inference()
