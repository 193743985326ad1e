"""Backend `flex`: SWAT through FlexAttention, lowered by torch.compile to Triton on CUDA and to C++ on a CPU.

Each call is padded to whole tiles, and its lengths to one of a few sizes, so that few programs serve all lengths;
window, lengths, slopes and document ids enter as tensors and never cause a compilation; docs/architecture.md says how
many programs that makes. With fewer queries than keys it is that many for each number of blocks of keys; a window of
more than 2^15 tokens adds one per doubling, a batch of one, a layout, requires_grad or a mode of torch another factor.

Three paths: an operator on a CPU, which computes in float32 whatever the dtype, forward only, and stays opaque to a
caller's torch.compile; FlexAttention inside the caller's own graph on CUDA, one graph for all symbolic lengths; and
the eager call on CUDA, which runs a program of its own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_flex import modifiers, tuned
from swat_flex.backends.flex import blocks as block_lists
from swat_flex.backends.flex import config as configs
from swat_flex.backends.flex.blocks import BLOCK, Form, Grid, band, cached_band, padded_blocks, wide_ids
from swat_flex.backends.flex.config import FlexConfig
from swat_flex.backends.operator import define, empty_output
from swat_flex.operands import Operands
from swat_flex.problem import NO_HARDWARE_TANH, Problem
from swat_flex.tracing import is_traced
from swat_flex.tuned import Tunable

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # asked here: torch 2.11 cannot trace the question


def supports(problem: Problem) -> str | None:
    """Say why `flex` cannot run this problem, or return None."""
    device = problem.device.type
    if problem.activation == "tanh-sigmoid":
        return NO_HARDWARE_TANH
    if problem.dtype == torch.float64:
        return "FlexAttention does not compute in float64"
    if problem.kv_len > 2**24:
        return f"its distances are exact up to 2^24 tokens, got {problem.kv_len}"
    if device == "cpu":
        return "FlexAttention has no backward on a CPU; call it under torch.no_grad()" if problem.needs_grad else None
    if device != "cuda":
        return f"FlexAttention is lowered for CPU and CUDA here, not for {device}"
    if not _HAS_TRITON:
        return "FlexAttention on CUDA needs Triton, which is not installed"
    if problem.dtype == torch.float16 and problem.needs_grad and problem.activation == "sigmoid":
        return "its backward holds g · Σσ in float16, which overflows for wide windows; train in bfloat16"
    return None


def _default(problem: Problem) -> FlexConfig:
    return configs.choose(problem.head_dim, problem.value_dim, problem.dtype)


FLEX = Tunable(
    name="flex",
    config_type=FlexConfig,
    choices=configs.choices,
    is_valid=FlexConfig.is_valid,
    default=_default,
    files=tuple(Path(str(file)) for file in (__file__, block_lists.__file__, configs.__file__, modifiers.__file__)),
    joint=True,
)


def tunables(problem: Problem) -> tuple[Tunable[FlexConfig], ...]:
    """List what a call of this problem looks up: nothing on a CPU, whose C++ template leaves nothing to choose."""
    return () if problem.device.type == "cpu" else (FLEX,)


def swat(operands: Operands) -> Tensor:
    """Compute `[B, Hq, Lq, Dv]`."""
    q = operands.q
    if q.device.type == "cpu":
        return _cpu_operator(operands)
    if q.shape[0] == 0 or q.shape[2] == 0:
        return empty_output(q, operands.v.shape[3])
    with torch.autocast(q.device.type, enabled=False):
        return _traced(operands) if is_traced(q) else _eager(operands)


def _on_cpu(operands: Operands) -> Tensor:
    from swat_flex.backends.flex.programs import Inputs, Settings, run_compiled  # imports half of torch's compiler

    q, k, v, ids = operands.q, operands.k, operands.v, operands.document_ids
    q_len, kv_len, softmax = q.shape[2], k.shape[2], operands.activation == "softmax"
    out = empty_output(q, v.shape[3])
    rows, columns = padded_blocks(q_len, per_doubling=1), padded_blocks(kv_len, per_doubling=1)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        # Copies, also where nothing is padded: tensors of inference mode would ask for programs of their own.
        q = F.pad(q.float(), (0, 0, 0, rows * BLOCK - q_len))
        if softmax:
            k, v = (F.pad(x.float(), (0, 0, 0, columns * BLOCK - kv_len)) for x in (k, v))
        else:
            columns += 1  # the block of the extra key
            k, v = modifiers.with_extra_key(k.float(), v.float(), columns * BLOCK)
        slopes, logit_bias = (x if x is None else x.detach().clone() for x in (operands.slopes, operands.logit_bias))
        grid = Grid(operands.window, q_len, kv_len, rows, columns, q.device)
        form = Form(extra_key=not softmax, dense_shape=True)
        ids, bounds, blocks = _bounded(grid, form, ids, len(q))
        inputs = Inputs(q, k, v, slopes, logit_bias, ids)
        result = run_compiled(inputs, bounds, blocks, Settings(operands.scale, softmax, None))
    return out.copy_(result[:, :, :q_len])


_cpu_operator = define("flex", _on_cpu)


def _eager(operands: Operands) -> Tensor:
    """Run a program of our own on CUDA, with the configuration measured fastest."""
    from swat_flex.backends.flex.programs import Inputs, Settings, run_compiled

    q, k, v = operands.q, operands.k, operands.v
    q_len, kv_len, softmax = q.shape[2], k.shape[2], operands.activation == "softmax"
    problem = operands.problem()
    config = (tuned.lookup(FLEX, problem) or _default(problem)).fitting(problem)
    block = config.mask_block
    q, k, v = (_padded(x, padded_blocks(x.shape[2], per_doubling=4)) for x in (q, k, v))
    grid = Grid(operands.window, q_len, kv_len, q.shape[2] // block, k.shape[2] // block, q.device, block)
    form = Form(backward=problem.needs_grad, merged=config.contiguous)
    ids, bounds, blocks = _bounded(grid, form, operands.document_ids, len(q))
    slopes, logit_bias = (by_query(x, q.shape[2]) for x in (operands.slopes, operands.logit_bias))
    settings = Settings(operands.scale, softmax, config)
    out = run_compiled(Inputs(q, k, v, slopes, logit_bias, ids), bounds, blocks, settings)
    return out[:, :, :q_len, : operands.v.shape[3]]


def _traced(operands: Operands) -> Tensor:
    """Become part of the caller's graph on CUDA; lengths may be symbols, and nothing here guards on them."""
    from swat_flex.backends.flex.programs import Inputs, Settings, attend

    q, k, v = operands.q, operands.k, operands.v
    q_len, kv_len, ids = q.shape[2], k.shape[2], operands.document_ids
    config = configs.choose(q.shape[3], v.shape[3], q.dtype)
    q, k, v = (_padded(x, _traced_blocks(x.shape[2])) for x in (q, k, v))
    block = config.mask_block
    grid = Grid(operands.window, q_len, kv_len, q.shape[2] // block, k.shape[2] // block, q.device, block)
    slopes, logit_bias = operands.slopes, operands.logit_bias
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, slopes, logit_bias))
    ids = None if ids is None else wide_ids(ids, len(q), kv_len)
    bounds, blocks = band(grid, Form(backward=wanted, merged=config.contiguous), ids)
    if _is_known(q_len % BLOCK == 0):  # FlexAttention wants captured tensors without symbols in their shapes
        slopes, logit_bias = by_query(slopes, q.shape[2]), by_query(logit_bias, q.shape[2])
    settings = Settings(operands.scale, operands.activation == "softmax", config)
    out = attend(Inputs(q, k, v, slopes, logit_bias, ids), bounds, blocks, settings)
    return out[:, :, :q_len, : operands.v.shape[3]]


def _bounded(
    grid: Grid, form: Form, ids: Tensor | None, batch: int
) -> tuple[Tensor | None, block_lists.Bounds, block_lists.BlockLists]:
    """Return (document ids of whole blocks, bounds, block lists) of a call whose sizes are numbers."""
    bounds, blocks = cached_band(grid, form, ids, batch)
    if ids is not None:
        padding = grid.columns * grid.block - grid.kv_len
        ids = F.pad(wide_ids(ids, batch, grid.kv_len), (0, padding), value=-1)
    return ids, bounds, blocks


def _padded(x: Tensor, blocks: int) -> Tensor:
    """Pad to whole blocks, since a ragged end gives NaN gradients, and to the 16 channels that FlexAttention needs."""
    channels, tokens = max(16 - x.shape[3], 0), blocks * BLOCK - x.shape[2]
    if channels == 0 and _is_known(tokens == 0):
        return x  # F.pad would copy it
    return F.pad(x, (0, channels, 0, tokens))


def _traced_blocks(length: int) -> int:
    """Return the number of blocks to pad to: for symbolic lengths two more than are full, so that torch.compile needs
    no guard on the remainder."""
    return length // BLOCK if _is_known(length % BLOCK == 0) else length // BLOCK + 2


def _is_known(condition: bool) -> bool:
    """Tell whether a condition on lengths holds, and holds for every length that a symbol in it stands for."""
    if not torch.compiler.is_compiling() and isinstance(condition, bool):
        return condition  # in a trace a symbolic condition poses as a bool, and using it would guard on it
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def by_query(x: Tensor | None, q_len: int) -> Tensor | None:
    """Return `[Hq, Lq]` where x needs a gradient: its atomic additions then meet in one number per query, not in one
    per head."""
    if x is None or not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return x[:, None].repeat(1, q_len)
