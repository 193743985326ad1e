"""Tile sizes of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["forward", "query_gradient", "key_gradients"]


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """How a kernel is cut.

    block_m: queries in a tile.
    block_n: keys in a tile.
    warps: of one program.
    stages: tiles in flight in the loop over fully visible tiles.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


# (largest padded head dimension, configuration), for 16-bit dtypes: what compiles for sm_90 without a spill. The last
# of each is small enough for every GPU and is what a kernel falls back to where shared memory is short.
_HALF: dict[Kernel, tuple[tuple[int, TritonConfig], ...]] = {
    "forward": (
        (64, TritonConfig(128, 64, 4, 3)),
        (128, TritonConfig(128, 64, 8, 2)),
        (256, TritonConfig(64, 32, 8, 2)),
    ),
    "query_gradient": (
        (64, TritonConfig(128, 64, 8, 3)),
        (128, TritonConfig(128, 64, 8, 2)),
        (256, TritonConfig(64, 32, 8, 2)),
    ),
    "key_gradients": (
        (64, TritonConfig(64, 128, 8, 2)),
        (128, TritonConfig(32, 128, 8, 2)),
        (256, TritonConfig(32, 32, 8, 2)),
    ),
}
_SMALLEST = TritonConfig(32, 32, 4, 1)


def configurations(kernel: Kernel, padded_dim: int, itemsize: int) -> tuple[TritonConfig, ...]:
    """What to run, and what to run instead where that does not fit into the device's shared memory.

    Args:
        kernel: which.
        padded_dim: the larger of the padded head dimensions.
        itemsize: bytes per element; float32 is multiplied without tensor cores, in small tiles.
    """
    if itemsize == 4:
        return TritonConfig(32, 32, 4, 1), TritonConfig(16, 16, 4, 1)
    chosen = next(config for largest, config in _HALF[kernel] if padded_dim <= largest)
    return chosen, _SMALLEST


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the decode kernel is cut.

    block_n: keys in a tile.
    warps: of one program.
    stages: tiles in flight.
    splits: programs that share the keys of one key head; their sums are added by a second kernel.
    """

    block_n: int
    warps: int
    stages: int
    splits: int


def decode_configurations(
    programs: int, rows: int, slots: int, padded_dim: int, itemsize: int, multiprocessors: int
) -> tuple[DecodeConfig, ...]:
    """What to run, and what to run instead where that does not fit into the device's shared memory.

    A copy-bound kernel wants bytes in flight on every multiprocessor: as many splits as give each about four programs,
    but at least two tiles of keys to a split.

    Args:
        programs: of one split.
        rows: queries in a tile.
        slots: of the ring.
        padded_dim: the larger of the padded head dimensions.
        itemsize: bytes per element.
        multiprocessors: of the device.
    """
    if itemsize == 4:
        block, stages = 32, 2
    else:
        block, stages = (64, 4) if padded_dim <= 64 else (64, 3) if padded_dim <= 128 else (32, 3)
    warps = 8 if rows * padded_dim > 32 * 128 else 4  # the sums of a large tile need more registers than 4 warps have

    def cut(block_n: int, stages: int) -> DecodeConfig:
        splits = min(4 * multiprocessors // programs, slots // (2 * block_n))
        return DecodeConfig(block_n, warps, stages, max(splits, 1))

    return cut(block, stages), cut(16, 1)
