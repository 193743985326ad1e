"""Decoding on a GPU: which configuration, how many splits, and the launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swat_flex.backends.operator import define_decode, empty_output
from swat_flex.backends.triton.config import DecodeConfig, compiler_options, decode_configurations, decode_values
from swat_flex.backends.triton.descriptors import padded
from swat_flex.backends.triton.launch import (
    FLOAT16_SHIFT,
    Launch,
    candidates,
    first_fitting,
    on_device_of,
    sigmoid_kind,
    target_of,
)
from swat_flex.problem import Problem
from swat_flex.tuned import Tunable

# config.py says how many splits None is.
FILES = ("decode_op.py", "launch.py", "decode.py", "config.py", "sigmoid.py", "tiles.py")
MAX_ROWS = 64  # queries of one program: those of a group beyond read its keys again


def row_tile(rows: int) -> int:
    """Rows in a tile for `rows` = group·T queries that share a key head."""
    return min(MAX_ROWS, padded(rows))


def default_configurations(problem: Problem) -> tuple[DecodeConfig, ...]:
    """List what a step, as `Problem.of_step` describes it, runs with where nothing was measured, the smallest last."""
    widest = padded(max(problem.head_dim, problem.value_dim))
    return decode_configurations(row_tile(problem.group * problem.q_len), widest, problem.dtype.itemsize)


DECODE: Tunable[DecodeConfig] = Tunable(
    name="triton.decode",
    config_type=DecodeConfig,
    choices=lambda problem: decode_values(problem.kv_len),
    is_valid=DecodeConfig.is_valid,
    default=lambda problem: default_configurations(problem)[0],
    files=tuple(Path(__file__).with_name(name) for name in FILES),
)


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # of the interpreter: enough for the splits to be seen


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, slopes: Tensor | None, logit_bias: Tensor | None,
    window: int, scale: float,
) -> Tensor:  # fmt: skip
    vectors = tuple(None if x is None else x.contiguous() for x in (slopes, logit_bias))
    inputs = (q, keys, values, length.contiguous(), vectors)
    step = Problem.of_step(q, keys, values, window, slopes, logit_bias)
    configs = candidates(DECODE, step, default_configurations(step))
    with on_device_of(q):
        return first_fitting(configs, lambda config: _launch(config, inputs, window, scale))


def _launch(config: DecodeConfig, inputs: tuple[Any, ...], window: int, scale: float) -> Tensor:
    """Run one kernel or, where the keys are split, two, and return the output."""
    device = inputs[0].device
    out, *kernels = launches(config, inputs, window, scale, target_of(device), _multiprocessors(device))
    for kernel in kernels:
        if kernel is not None:
            kernel.run()
    return out


def launches(
    config: DecodeConfig, inputs: tuple[Any, ...], window: int, scale: float, target: str, multiprocessors: int
) -> tuple[Tensor, Launch, Launch | None]:
    """The output, the launch that computes it or its parts, and the launch that adds these.

    Args:
        inputs: q, keys, values, length, and (slopes, logit_bias), each `[Hq]` or None.
        target: as in `launch.Launches`.
        multiprocessors: of the device; they decide the number of splits.
    """
    from swat_flex.backends.triton.decode import decode_kernel, sum_splits_kernel

    q, keys, values = inputs[:3]
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads, slots, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    rows = q_heads // kv_heads * tokens
    tile = row_tile(rows)
    width, value_width = (head_dim, padded(head_dim)), (value_dim, padded(value_dim))
    out = parts = empty_output(q, value_dim)
    programs = -(-rows // tile) * kv_heads * batch
    splits = config.splits_of(programs, slots, multiprocessors)
    if splits > 1:
        parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=q.device)
    strides = (q.stride(), keys.stride(), values.stride(), parts.stride()[-4:])
    sizes = (out.numel(), tokens, slots, window, scale, kv_heads, q_heads // kv_heads, splits)
    way = (
        inputs[4][0] is not None,
        False,
        FLOAT16_SHIFT if q.dtype == torch.float16 else 0,
        sigmoid_kind(q.dtype, "sigmoid", target),
    )
    options = {"WIDTH": width, "VALUE_WIDTH": value_width, "WAY": way, "ONE": tokens == 1, "BM": tile,
               "BN": config.block_n, "STAGES": config.stages}  # fmt: skip
    options |= compiler_options(config)
    first = Launch(decode_kernel, splits * programs, (*inputs, parts, *strides, *sizes), options)
    if splits == 1:
        return out, first, None
    # There is nothing to fuse: Triton 3.9 warns where nobody says so.
    options = {"VALUE_WIDTH": value_width, "BS": 16, "num_warps": 4, "enable_fp_fusion": True}
    args = (parts, out, out.stride(), out.numel(), tokens, q_heads, splits)
    return out, first, Launch(sum_splits_kernel, out.numel() // value_dim, args, options)


decode = define_decode("triton", _decode)
