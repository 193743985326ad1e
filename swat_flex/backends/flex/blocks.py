"""The tiles FlexAttention visits, from arithmetic on the window and the document ids; never a dense mask."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_flex.tracing import can_cache, is_capturing
from swat_flex.window import Window

BLOCK = 128  # tokens on each side of a tile of the block mask; lengths are padded to a multiple of it


Documents = tuple[Tensor, Tensor]  # id ranges `[3, B, ·]` of the blocks of queries and of keys


class BlockLists(NamedTuple):
    """FlexAttention's lists: for each row of tiles how many key blocks to visit, and which, int32.

    `kv_*` are `[B, 1, rows]` and `[B, 1, rows, ·]`, B = 1 without documents; `q_*` the same with keys and queries
    exchanged, for the backward, or None. Pairs of a `full` tile are all visible, those of the others must be masked.
    """

    kv_num: Tensor
    kv_indices: Tensor
    full_kv_num: Tensor | None = None
    full_kv_indices: Tensor | None = None
    q_num: Tensor | None = None
    q_indices: Tensor | None = None
    full_q_num: Tensor | None = None
    full_q_indices: Tensor | None = None


class Bounds(NamedTuple):
    """What the modifiers compare with, int32 of no dimension: as tensors they may change without a compilation."""

    left: Tensor
    right: Tensor
    offset: Tensor
    kv_len: Tensor


class Form(NamedTuple):
    """Which lists a program reads, and in what form.

    Attributes:
        backward: with the lists by column, which only a backward reads.
        extra_key: every row that holds a query also visits the last column, the tile of the extra key.
        dense_shape: `kv_indices` has the shape `[B, 1, rows, columns]` that the CPU template demands: a view whose
            rows overlap in memory, no larger than without.
        merged: every visited tile is partial; without documents each list then names neighbours alone.
    """

    backward: bool = False
    extra_key: bool = False
    dense_shape: bool = False
    merged: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """The tiles of Lq queries × Lk keys in a padded rectangle of `rows` × `columns` tiles, `block` tokens a side.

    Row r holds the positions from Lk − Lq + r·block on, column c the keys from c·block on. The arithmetic holds for
    symbolic lengths and puts no guard on them.
    """

    window: Window
    q_len: int
    kv_len: int
    rows: int
    columns: int
    device: torch.device
    block: int = BLOCK

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.kv_len - self.q_len

    @property
    def sides(self) -> tuple[int, int]:
        """The window's (left, right), at most the number of keys."""
        left, right = (self.kv_len if n is None else min(n, self.kv_len) for n in (self.window.left, self.window.right))
        return left, right

    def documents(self, document_ids: Tensor) -> Documents:
        """Return the id ranges of the blocks of queries and of keys, from int `[B, Lk]`."""
        of_queries = _id_ranges(document_ids[:, self.offset :], self.rows, self.block)
        return of_queries, _id_ranges(document_ids, self.columns, self.block)

    def key_blocks(self, documents: Documents | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return (columns, partial, full): for each row the columns its window may touch, int32 `[rows, ·]`, and which
        of them it visits with and without a mask, bool `[B, rows, ·]`."""
        row = torch.arange(self.rows, device=self.device, dtype=torch.int32)[:, None]
        column = (self.offset + row * self.block - self.sides[0]) // self.block + self._span()
        return column, *self._visited(row, column, documents)

    def query_blocks(self, documents: Documents | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return (rows, partial, full): for each column the rows that may touch it, as `key_blocks`."""
        column = torch.arange(self.columns, device=self.device, dtype=torch.int32)[:, None]
        row = (column * self.block - self.sides[1] - self.offset) // self.block + self._span()
        return row, *self._visited(row, column, documents)

    def _span(self) -> Tensor:
        """Count 0, 1, …: as many blocks as one block and its window can touch."""
        blocks = (sum(self.sides) + 2 * self.block - 2) // self.block + 1
        return torch.arange(blocks, device=self.device, dtype=torch.int32)

    def _visited(self, row: Tensor, column: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor]:
        """Return (partial, full) of the tiles named by row and column, also outside the grid.

        The distances i − j of a tile's pairs are an interval.
        """
        left, right = self.sides
        position, key = self.offset + row * self.block, column * self.block
        farthest = (position + self.block).clamp(max=self.kv_len) - 1 - key
        nearest = position - (key + self.block).clamp(max=self.kv_len) + 1
        real = (row >= 0) & (position < self.kv_len) & (column >= 0) & (key < self.kv_len)
        touched = real & (farthest >= -right) & (nearest <= left)
        whole = (position + self.block <= self.kv_len) & (key + self.block <= self.kv_len)
        full = touched & whole & (farthest <= left) & (nearest >= -right)
        touched, full = touched[None], full[None]
        if documents is not None:
            of_queries, of_keys = documents
            q_low, q_high, q_real = of_queries[:, :, torch.where(real, row, 0)]
            k_low, k_high, k_real = of_keys[:, :, torch.where(real, column, 0)]
            touched = touched & (q_low <= k_high) & (k_low <= q_high)
            one_document = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
            full = full & touched & one_document & q_real.bool() & k_real.bool()
        return touched & ~full, full


def band(grid: Grid, form: Form, document_ids: Tensor | None = None) -> tuple[Bounds, BlockLists]:
    """Build the window in FlexAttention's form on the grid's device.

    With `document_ids`, int32 or int64 `[B, Lk]`, tiles whose id ranges do not meet are left out.
    """
    numbers = (*grid.sides, grid.offset, grid.kv_len)
    bounds = Bounds(*(torch.full((), n, dtype=torch.int32, device=grid.device) for n in numbers))
    documents = None if document_ids is None else grid.documents(document_ids)
    column, partial, full = grid.key_blocks(documents)
    if form.extra_key:
        last = torch.full_like(column[:, :1], grid.columns - 1)
        holds_query = (torch.arange(grid.rows, device=grid.device) * grid.block < grid.q_len)[:, None]
        column = torch.cat((column, last), 1)
        partial = torch.cat((partial, holds_query.expand(partial.shape[0], -1, -1)), 2)
        full = F.pad(full, (0, 1))
    view = grid.columns if form.dense_shape else None
    by_row = _lists(column, partial, full, grid.columns, view, form.merged)
    if not form.backward:
        return bounds, BlockLists(*by_row)
    row, partial, full = grid.query_blocks(documents)
    return bounds, BlockLists(*by_row, *_lists(row, partial, full, grid.rows, None, form.merged))


def cached_band(grid: Grid, form: Form, document_ids: Tensor | None = None) -> tuple[Bounds, BlockLists]:
    """Build `band`, or reuse one of the last `KEPT`, made for the same grid and the same unchanged tensor of ids.

    `document_ids` are int `[B, Lk]` or `[Lk]`. Tensors made under inference mode are ordinary ones here, so that
    training may reuse them. What a captured CUDA graph meets stays for good, since its replays read it.
    """
    with torch.inference_mode(False):
        key = grid, form, None if document_ids is None else (id(document_ids), _version(document_ids))
        made, of = _bands.get(key, (None, None))
        if made is not None and (document_ids is None or (of is not None and of() is document_ids)):
            if is_capturing(grid.device):
                _pinned[key] = made
            return made
        made = band(grid, form, None if document_ids is None else wide_ids(document_ids, grid.kv_len))
        if can_cache(made[0].left):
            if len(_bands) >= KEPT:
                del _bands[next(iter(_bands))]
            _bands[key] = made, None if document_ids is None else weakref.ref(document_ids)
        return made


KEPT = 32  # bands remembered at a time; the oldest goes first
_Key = tuple[Grid, Form, tuple[int, int] | None]
_bands: dict[_Key, tuple[tuple[Bounds, BlockLists], weakref.ref[Tensor] | None]] = {}
_pinned: dict[_Key, tuple[Bounds, BlockLists]] = {}


def _version(x: Tensor) -> int:
    """Count the writes to a tensor; an inference tensor does not say, and counts as always written."""
    return next(_never) if x.is_inference() else x._version


_never = itertools.count(-1, -1)


def wide_ids(ids: Tensor, kv_len: int) -> Tensor:
    """Return ids as int32 or int64 `[B, Lk]`, B = 1 where all rows share them."""
    return ids.view(-1, kv_len).to(torch.int64 if ids.dtype == torch.int64 else torch.int32)


def _lists(
    block: Tensor, partial: Tensor, full: Tensor, blocks: int, view: int | None, merged: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """List the partial tiles and the full ones; where they are merged, all as partial."""
    if merged:
        return *_listed(block, partial | full, blocks, view), None, None
    return *_listed(block, partial, blocks, view), *_listed(block, full, blocks, view)


def _listed(block: Tensor, visited: Tensor, blocks: int, view: int | None) -> tuple[Tensor, Tensor]:
    """Return (how many, which in ascending order) of the visited blocks; places past the number hold a valid block.

    The width is rounded up coarsely, since a compiled program is bound to its inputs' strides.
    """
    number = visited.sum(-1, dtype=torch.int32)[:, None]
    which = torch.where(visited, block, blocks).sort(-1).values.clamp(max=blocks - 1)
    batch, lists, width = which.shape
    if torch.compiler.is_compiling():  # the caller's program: lengths may be symbols
        return number, which[:, None]
    pitch = max(256, 1 << (width - 1).bit_length())
    pitch = pitch if view is None else min(pitch, view)
    spread = which.new_zeros(batch * lists * pitch + (view or pitch) - pitch)
    rows = spread[: batch * lists * pitch].view(batch, lists, pitch)
    rows[:, :, :width] = which[:, :, :pitch]
    return number, spread.as_strided((batch, 1, lists, view or pitch), (lists * pitch, lists * pitch, pitch, 1))


def _id_ranges(ids: Tensor, blocks: int, block: int) -> Tensor:
    """Return `[3, B, blocks]`: a block's lowest and highest id, padding apart, and whether it has no padding.

    A block of padding alone comes out as an empty interval, which meets no other.
    """
    padded = F.pad(ids, (0, blocks * block - ids.shape[1]), value=-1).view(-1, blocks, block)
    lowest = torch.where(padded < 0, torch.iinfo(ids.dtype).max, padded).amin(2)
    return torch.stack((lowest, padded.amax(2), (padded >= 0).all(2).to(ids.dtype)))


def padded_blocks(length: int, per_doubling: int) -> int:
    """Return the blocks that a length is padded to: any number up to `per_doubling`, then that many per doubling."""
    blocks = max(1, -(-length // BLOCK))
    step = max(1, (1 << (blocks - 1).bit_length()) // (2 * per_doubling))
    return -(-blocks // step) * step
