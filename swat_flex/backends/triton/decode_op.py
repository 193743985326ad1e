"""Decoding on a GPU: which configuration, how many splits, and the launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swat_flex import tuned
from swat_flex.backends.operator import define_decode, empty_output
from swat_flex.backends.triton.config import DecodeConfig, compiler_options, decode_configurations, decode_values
from swat_flex.backends.triton.descriptors import padded
from swat_flex.backends.triton.launch import FLOAT16_SHIFT, Launch, sigmoid_kind, target_of
from swat_flex.backends.triton.op import _on
from swat_flex.problem import Problem
from swat_flex.tuned import Tunable

# config.py says how many splits None is.
FILES = ("decode_op.py", "launch.py", "decode.py", "config.py", "sigmoid.py", "tiles.py")
MAX_ROWS = 64  # queries of one program: those of a group beyond read its keys again


def row_tile(rows: int) -> int:
    """Rows in a tile for `rows` = group·T queries that share a key head."""
    return min(MAX_ROWS, padded(rows))


def decode_configuration(problem: Problem) -> DecodeConfig:
    """Return what a step runs with where nothing was measured.

    Args:
        problem: T queries (q_len) against the window + T − 1 keys (kv_len) that any of them sees.
    """
    rows = row_tile(problem.q_heads // problem.kv_heads * problem.q_len)
    widest = max(padded(problem.head_dim), padded(problem.value_dim))
    return decode_configurations(rows, widest, problem.dtype.itemsize)[0]


DECODE: Tunable[DecodeConfig] = Tunable(
    name="triton.decode",
    config_type=DecodeConfig,
    choices=lambda problem: decode_values(problem.kv_len),
    is_valid=DecodeConfig.is_valid,
    default=decode_configuration,
    files=tuple(Path(__file__).with_name(name) for name in FILES),
)


def _candidates(
    q: Tensor, keys: Tensor, values: Tensor, slopes: Tensor | None, logit_bias: Tensor | None, window: int
) -> tuple[DecodeConfig, ...]:
    """List what was measured fastest, then the defaults; the one in force alone, which must not be replaced."""
    if (forced := tuned.forced(DECODE)) is not None:
        return (forced,)
    winner = tuned.lookup(DECODE, Problem.of_step(q, keys, values, window, slopes, logit_bias))
    widest = max(padded(q.shape[3]), padded(values.shape[3]))
    defaults = decode_configurations(_rows(q, keys)[1], widest, q.element_size())
    return defaults if winner is None else (winner, *defaults)


def _rows(q: Tensor, keys: Tensor) -> tuple[int, int]:
    """Queries that share a key head, and those of them in a tile."""
    rows = q.shape[1] // keys.shape[1] * q.shape[2]
    return rows, row_tile(rows)


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # of the interpreter: enough for the splits to be seen


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, slopes: Tensor | None, logit_bias: Tensor | None,
    window: int, scale: float,
) -> Tensor:  # fmt: skip
    from triton.runtime.errors import OutOfResources

    vectors = tuple(None if x is None else x.contiguous() for x in (slopes, logit_bias))
    inputs = (q, keys, values, length.contiguous(), vectors)
    *larger, smallest = _candidates(q, keys, values, slopes, logit_bias, window)
    with _on(q):
        for config in larger:
            try:
                return _launch(config, inputs, window, scale)
            except OutOfResources:
                continue
        return _launch(smallest, inputs, window, scale)


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
        config: how the kernel is cut.
        inputs: q, keys, values, length, and (slopes, logit_bias), each `[Hq]` or None.
        window: keys that a query sees.
        scale: factor on ⟨q, k⟩.
        target: as in `launch.Launches`.
        multiprocessors: of the device; they decide the number of splits.
    """
    from swat_flex.backends.triton.decode import decode_kernel, sum_splits_kernel

    q, keys, values = inputs[:3]
    batch, q_heads, tokens, head_dim = q.shape
    kv_heads, slots, value_dim = keys.shape[1], keys.shape[2], values.shape[3]
    rows, tile = _rows(q, keys)
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
    options = {"VALUE_WIDTH": value_width, "BS": 16, "num_warps": 4}
    args = (parts, out, out.stride(), out.numel(), tokens, q_heads, splits)
    return out, first, Launch(sum_splits_kernel, out.numel() // value_dim, args, options)


decode = define_decode("triton", _decode)
