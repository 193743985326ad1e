"""Tile sizes of the kernels: the defaults, and what the tuner may try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kernel = Literal["forward", "query_gradient", "key_gradients"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
Pair = Literal["queries", "keys"]


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """How a kernel cuts its work.

    Attributes:
        block_m: queries in a tile.
        block_n: keys in a tile.
        warps: warps of one program.
        stages: steps of a loop in flight.
        descriptors: whether loops load with the tensor memory accelerator, where a tensor qualifies.
        warp_specialize: whether loads, products and σ go to warps of their own; `warps` then counts those of σ.
        pair: the forward takes two tiles at a time, and computes the weights of one while the products of the other
            run: of "queries", which share the keys, of two heads where a key head has an even number of them; or of
            "keys".
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False
    warp_specialize: bool = False
    pair: Pair | None = None

    def is_valid(self) -> bool:
        """Tiles that a matrix product takes, with 2 to 128 scores per thread: half of its registers at most."""
        powers = all(n >= 1 and n & (n - 1) == 0 for n in (self.block_m, self.block_n, self.warps))
        scores = self.tiles * self.block_m * self.block_n / (32 * self.warps)
        return powers and min(self.block_m, self.block_n) >= 16 and 2 <= scores <= 128 and self.stages >= 1

    @property
    def tiles(self) -> int:
        """Tiles of scores that a program has at a time."""
        return 1 if self.pair is None else 2

    def pairing(self, group: int) -> str | None:
        """The forward's PAIR for a group of query heads that share a key head."""
        if self.pair != "queries":
            return self.pair
        return "heads" if group % 2 == 0 else "rows"

    def forward_programs(self, q_len: int, q_heads: int, group: int) -> int:
        """Number of programs of the forward for one sequence."""
        pairing = self.pairing(group)
        rows = 2 * self.block_m if pairing == "rows" else self.block_m
        return -(-q_len // rows) * (q_heads // 2 if pairing == "heads" else q_heads)


# By kernel and the largest padded head dimension: what compiles without a spill in the loops.
_Table = dict[tuple[Kernel, int], TritonConfig]
_COMMON: _Table = {
    ("forward", 64): TritonConfig(128, 64, 4, 3),
    ("forward", 128): TritonConfig(128, 64, 8, 2),
    ("forward", 256): TritonConfig(64, 32, 8, 2),
    # At D = 64 the backward's tiles of 64 × 64 with 4 warps give two programs to a multiprocessor where these give one,
    # at 12.6 instead of 13.2 instructions per score for dq and 13.4 instead of 13.9 for dk and dv (sm_90), and load
    # twice the bytes per score: at full issue 40 per clock, close to what the second-level cache gives.
    ("query_gradient", 64): TritonConfig(128, 64, 8, 3),
    ("query_gradient", 128): TritonConfig(128, 64, 8, 2),
    ("query_gradient", 256): TritonConfig(64, 32, 8, 2),
    ("key_gradients", 64): TritonConfig(64, 128, 8, 2),
    ("key_gradients", 128): TritonConfig(32, 128, 8, 2),
    ("key_gradients", 256): TritonConfig(32, 32, 8, 2),
}
# Where a warp goes on while its products run.
_HOPPER: _Table = _COMMON | {
    ("forward", 64): TritonConfig(64, 64, 4, 3, pair="queries"),
    ("forward", 128): TritonConfig(128, 64, 8, 2, pair="keys"),
}
# Where products take their operands from registers, which leaves fewer for the rest.
_AMPERE: _Table = _COMMON | {
    ("forward", 128): TritonConfig(64, 32, 4, 2),
    ("query_gradient", 128): TritonConfig(128, 32, 8, 2),
    ("key_gradients", 64): TritonConfig(32, 128, 8, 2),
    ("key_gradients", 128): TritonConfig(32, 64, 4, 2),
}
# The same with 99 KiB of shared memory to a block, and where the compilers of sm_86, 89 and 120 spill.
_SMALL: _Table = _AMPERE | {
    ("forward", 64): TritonConfig(128, 32, 4, 3),
    ("query_gradient", 256): TritonConfig(32, 32, 8, 2),
    ("key_gradients", 128): TritonConfig(64, 64, 8, 2),
}
# Warps of 64 threads, which hold more of a tile.
_CDNA: _Table = _COMMON | {
    ("forward", 128): TritonConfig(128, 32, 4, 2),
    ("query_gradient", 64): TritonConfig(64, 32, 4, 2),
    ("query_gradient", 128): TritonConfig(64, 32, 4, 2),
    ("key_gradients", 64): TritonConfig(32, 64, 4, 2),
    ("query_gradient", 256): TritonConfig(32, 32, 4, 1),
    ("key_gradients", 128): TritonConfig(16, 64, 4, 2),
    ("key_gradients", 256): TritonConfig(16, 32, 4, 1),
}
# float32 is multiplied without tensor cores: a thread holds its operands in registers too.
_FLOAT32: _Table = {
    ("forward", 64): TritonConfig(32, 32, 8, 1),
    ("forward", 128): TritonConfig(32, 16, 8, 1),
    ("forward", 256): TritonConfig(16, 32, 16, 1),
    ("query_gradient", 64): TritonConfig(32, 32, 4, 1),
    ("query_gradient", 128): TritonConfig(16, 16, 4, 1),
    ("query_gradient", 256): TritonConfig(16, 16, 8, 1),
    ("key_gradients", 64): TritonConfig(32, 32, 4, 1),
    ("key_gradients", 128): TritonConfig(32, 16, 4, 1),
    ("key_gradients", 256): TritonConfig(16, 16, 8, 1),
}
# By a target's beginning; the first that fits.
_TABLES = {"sm_80": _AMPERE, "sm_8": _SMALL, "sm_9": _HOPPER, "sm_12": _SMALL, "gfx": _CDNA, "interpreter": _HOPPER}
_SMALLEST = TritonConfig(32, 32, 4, 1)  # fits every GPU
_SMALLEST_FLOAT32 = TritonConfig(16, 16, 4, 1)


def runs_on(kernel: Kernel, config: TritonConfig, target: str) -> bool:
    """Tell whether a kernel supports a configuration on "sm_90", "gfx942", … or "interpreter".

    A launch turns unsupported switches off. Triton's specialiser for Hopper takes neither two loops nor operands by
    pointer: 3.6 and 3.7 stop with an internal error. On Blackwell both kernels of the backward come out with spills or
    do not compile.
    """
    if (config.warp_specialize or config.pair is not None) and kernel != "forward":
        return False
    if config.warp_specialize and target not in ("sm_100", "interpreter"):
        return False
    accelerated = target == "interpreter" or (target.startswith("sm_") and int(target.removeprefix("sm_")) >= 90)
    return not config.descriptors or (accelerated and max(config.block_m, config.block_n) <= 256)


def shares_reciprocals(kernel: Kernel, config: TritonConfig, padded_dim: int, target: str) -> bool:
    """Tell whether four sigmoids of a row may share a reciprocal: their layout is as sigmoid.py expects.

    It takes a thread's scores in eights, and counts on two columns, the same two of the row eight below, and both
    again eight columns on. So a thread needs eight scores, and a warp 16 columns. Triton lays the warps of chained
    products over the rows where the tile of sums is at least as high as wide, else over the columns; with Hopper's
    products of four warps over the rows as far as these go. `padded_dim` is the larger of the padded head dimensions.
    """
    rows, columns = config.block_m, config.block_n
    if kernel == "key_gradients":
        rows, columns = columns, rows
    if target == "sm_90" and rows >= 64 and config.warps >= 4:
        beside = max(16 * config.warps // rows, 1)
    else:
        beside = 1 if rows >= max(columns, padded_dim) else config.warps
    return rows * columns >= 8 * 32 * config.warps and columns >= 16 * beside


def configurations(kernel: Kernel, padded_dim: int, itemsize: int, target: str) -> tuple[TritonConfig, ...]:
    """List what to run, and what to run instead where that does not fit into the device's shared memory."""
    width = 64 if padded_dim <= 64 else 128 if padded_dim <= 128 else 256
    if itemsize == 4:
        return _FLOAT32[kernel, width], _SMALLEST_FLOAT32
    table = next((table for prefix, table in _TABLES.items() if target.startswith(prefix)), _COMMON)
    return table[kernel, width], _SMALLEST


def promising(kernel: Kernel, padded_dim: int, itemsize: int) -> tuple[TritonConfig, ...]:
    """List what a search tries first: tiles that by count may be faster than the default, and by count need not be."""
    if kernel == "forward" or padded_dim > 64 or itemsize == 4:
        return ()
    return TritonConfig(64, 64, 4, 2), TritonConfig(64, 64, 4, 3)


# By field of TritonConfig: the values worth trying.
VALUES: dict[str, tuple[int | bool | str | None, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "warps": (2, 4, 8, 16),
    "stages": (1, 2, 3, 4, 5),
    "descriptors": (False, True),
    "warp_specialize": (False, True),
    "pair": (None, "queries", "keys"),
}


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the decode kernel cuts its work.

    Attributes:
        block_n: keys in a tile.
        warps: warps of one program.
        stages: blocks of keys in flight.
        splits: programs that share the keys of one key head; their sums are added by a second kernel. None is as many
            as fill the device, whatever the batch.
    """

    block_n: int
    warps: int
    stages: int
    splits: int | None = None

    def is_valid(self) -> bool:
        """Tiles that a matrix product takes, and at least one of everything."""
        powers = all(n >= 1 and n & (n - 1) == 0 for n in (self.block_n, self.warps))
        return powers and self.block_n >= 16 and self.stages >= 1 and (self.splits is None or self.splits >= 1)

    def splits_of(self, programs: int, slots: int, multiprocessors: int) -> int:
        """Number of splits of a launch on a ring of `slots`, where one split has `programs` programs.

        A copy-bound kernel wants bytes in flight on every multiprocessor: unless told otherwise as many splits as give
        each about four programs, but at least two tiles of keys to a split.
        """
        if self.splits is not None:
            return self.splits
        return max(min(4 * multiprocessors // programs, slots // (2 * self.block_n)), 1)

    def empty_splits(self, slots: int) -> int:
        """Number of splits that get no key from a full ring of so many slots."""
        if self.splits is None:
            return 0
        tiles = -(-slots // self.block_n)
        return self.splits - -(-tiles // -(-tiles // self.splits))


def decode_configurations(rows: int, padded_dim: int, itemsize: int) -> tuple[DecodeConfig, ...]:
    """As `configurations`, for tiles of `rows` queries."""
    if itemsize == 4:
        block, stages = 32, 2
    else:
        block, stages = (64, 4) if padded_dim <= 64 else (64, 3) if padded_dim <= 128 else (32, 3)
    warps = 8 if rows * padded_dim > 32 * 128 else 4  # the sums of a large tile need more registers than 4 warps have
    return DecodeConfig(block, warps, stages), DecodeConfig(16, warps, 1)


def decode_values(slots: int) -> dict[str, tuple[int | None, ...]]:
    """List by field of DecodeConfig: the values worth trying; splits with a tile of keys for each, of 16 at least.

    The same for all rings between two powers of two, which share measurements.
    """
    splits = (n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n == 1 or 16 * n < slots)
    return {"block_n": (16, 32, 64, 128), "warps": (2, 4, 8), "stages": (1, 2, 3, 4, 5), "splits": (None, *splits)}


def compiler_options(config: TritonConfig | DecodeConfig) -> dict[str, int | bool]:
    """Triton's compile options; fused multiply-adds are asked for, as Triton plans to stop fusing by default."""
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
