"""The tiles FlexAttention visits, from arithmetic on the window and the document ids; never a dense mask."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_flex.positions import outlives_this_call
from swat_flex.window import Window

TILE = 128  # tokens on each side of a tile, and what lengths are padded to a multiple of


class Blocks(NamedTuple):
    """FlexAttention's lists: for each row of tiles how many key tiles to visit, and which, int32.

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


class Grid:
    """The tiles of Lq queries × Lk keys in a padded rectangle of `rows` × `columns` tiles of `tile` tokens a side.

    Row r holds the positions from Lk − Lq + r·tile on, column c the keys from c·tile on. The arithmetic holds for
    symbolic lengths and puts no guard on them.
    """

    def __init__(
        self,
        window: Window,
        q_len: int,
        kv_len: int,
        rows: int,
        columns: int,
        document_ids: Tensor | None,
        device: torch.device,
        tile: int = TILE,
    ) -> None:
        self.kv_len, self.rows, self.columns, self.device, self.tile = kv_len, rows, columns, device, tile
        self.offset = kv_len - q_len
        self.left, self.right = (kv_len if n is None else min(n, kv_len) for n in (window.left, window.right))
        self.documents: tuple[Tensor, Tensor] | None = None
        if document_ids is not None:
            self.documents = (
                _ids_by_tile(document_ids[:, self.offset :], rows, tile),
                _ids_by_tile(document_ids, columns, tile),
            )

    def key_tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        """(columns, partial, full): for each row the columns its window may touch, int32 `[rows, ·]`, and which of
        them it visits with and without a mask, bool `[B, rows, ·]`."""
        row = torch.arange(self.rows, device=self.device, dtype=torch.int32)[:, None]
        column = (self.offset + row * self.tile - self.left) // self.tile + self._span()
        return column, *self._visited(row, column)

    def query_tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, partial, full): for each column the rows that may touch it, as `key_tiles`."""
        column = torch.arange(self.columns, device=self.device, dtype=torch.int32)[:, None]
        row = (column * self.tile - self.right - self.offset) // self.tile + self._span()
        return row, *self._visited(row, column)

    def _span(self) -> Tensor:
        """0, 1, …: as many tiles as one tile and their window can touch."""
        tiles = (self.left + self.right + 2 * self.tile - 2) // self.tile + 1
        return torch.arange(tiles, device=self.device, dtype=torch.int32)

    def _visited(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """(partial, full) of tiles named by row and column, also outside the grid; the distances i − j of a tile's
        pairs are an interval."""
        position, key = self.offset + row * self.tile, column * self.tile
        farthest = (position + self.tile).clamp(max=self.kv_len) - 1 - key
        nearest = position - (key + self.tile).clamp(max=self.kv_len) + 1
        real = (row >= 0) & (position < self.kv_len) & (column >= 0) & (key < self.kv_len)
        touched = real & (farthest >= -self.right) & (nearest <= self.left)
        whole = (position + self.tile <= self.kv_len) & (key + self.tile <= self.kv_len)
        full = touched & whole & (farthest <= self.left) & (nearest >= -self.right)
        touched, full = touched[None], full[None]
        if self.documents is not None:
            of_rows, of_columns = self.documents
            q_low, q_high, q_real = of_rows[:, :, torch.where(real, row, 0)]
            k_low, k_high, k_real = of_columns[:, :, torch.where(real, column, 0)]
            touched = touched & (q_low <= k_high) & (k_low <= q_high)
            one_document = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
            full = full & touched & one_document & q_real.bool() & k_real.bool()
        return touched & ~full, full


def band(
    window: Window,
    q_len: int,
    kv_len: int,
    rows: int,
    columns: int,
    device: torch.device,
    document_ids: Tensor | None,
    *,
    backward: bool,
    extra_key: bool,
    dense_shape: bool,
    tile: int = TILE,
    merged: bool = False,
) -> tuple[Bounds, Blocks]:
    """The window of one pair of lengths in FlexAttention's form, built on the device.

    Args:
        document_ids: int `[B, Lk]`; tiles whose id ranges do not meet are left out.
        backward: with the lists by column, which only a backward reads.
        extra_key: every row that holds a query also visits the last column, the tile of the extra key.
        dense_shape: give `kv_indices` the shape `[B, 1, rows, columns]` that the CPU template demands: a view whose
            rows overlap in memory, no larger than without.
        tile: tokens on each side of a tile.
        merged: every visited tile is partial; without documents each list then names neighbours alone.
    """
    grid = Grid(window, q_len, kv_len, rows, columns, document_ids, device, tile)
    numbers = (grid.left, grid.right, grid.offset, kv_len)
    bounds = Bounds(*(torch.full((), n, dtype=torch.int32, device=device) for n in numbers))
    column, partial, full = grid.key_tiles()
    if extra_key:
        last = torch.full_like(column[:, :1], columns - 1)
        holds_query = (torch.arange(rows, device=device) * tile < q_len)[:, None]
        column = torch.cat((column, last), 1)
        partial = torch.cat((partial, holds_query.expand(partial.shape[0], -1, -1)), 2)
        full = F.pad(full, (0, 1))
    view = columns if dense_shape else None
    by_row = _lists(column, partial, full, columns, view, merged)
    if not backward:
        return bounds, Blocks(*by_row)
    row, partial, full = grid.query_tiles()
    return bounds, Blocks(*by_row, *_lists(row, partial, full, rows, None, merged))


def kept_band(*call: Any, **form: Any) -> tuple[Bounds, Blocks]:
    """`band`, remembered where its tensors outlive the call; also from inference mode, which makes ordinary ones."""
    with torch.inference_mode(False):
        if not outlives_this_call(torch.empty(0, device=call[5])):
            return band(*call, **form)
        return _remembered(*call, **form)


_remembered = functools.lru_cache(maxsize=32)(band)


def _lists(
    tile: Tensor, partial: Tensor, full: Tensor, tiles: int, view: int | None, merged: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`_listed` of the partial tiles and of the full ones, None and None where there are none by agreement."""
    if merged:
        return *_listed(tile, partial | full, tiles, view), None, None
    return *_listed(tile, partial, tiles, view), *_listed(tile, full, tiles, view)


def _listed(tile: Tensor, visited: Tensor, tiles: int, view: int | None) -> tuple[Tensor, Tensor]:
    """(how many, which in ascending order) of the visited tiles; places past the number hold a valid tile.

    The width is rounded up coarsely, since a compiled program is bound to its inputs' strides.
    """
    number = visited.sum(-1, dtype=torch.int32)[:, None]
    which = torch.where(visited, tile, tiles).sort(-1).values.clamp(max=tiles - 1)
    batch, lists, width = which.shape
    if torch.compiler.is_compiling():  # the caller's program: lengths may be symbols
        return number, which[:, None]
    pitch = max(256, 1 << (width - 1).bit_length())
    pitch = pitch if view is None else min(pitch, view)
    spread = which.new_zeros(batch * lists * pitch + (view or pitch) - pitch)
    rows = spread[: batch * lists * pitch].view(batch, lists, pitch)
    rows[:, :, :width] = which[:, :, :pitch]
    return number, spread.as_strided((batch, 1, lists, view or pitch), (lists * pitch, lists * pitch, pitch, 1))


def _ids_by_tile(ids: Tensor, tiles: int, tile: int) -> Tensor:
    """`[3, B, tiles]`: the lowest and the highest id of a tile, padding apart, and whether it has no padding.

    A tile of padding alone comes out as an empty interval, which meets no other.
    """
    padded = F.pad(ids, (0, tiles * tile - ids.shape[1]), value=-1).view(-1, tiles, tile)
    lowest = torch.where(padded < 0, torch.iinfo(ids.dtype).max, padded).amin(2)
    return torch.stack((lowest, padded.amax(2), (padded >= 0).all(2).to(ids.dtype)))


def padded_tiles(length: int, per_doubling: int) -> int:
    """Tiles a length is padded to: any number up to `per_doubling`, from there on that many sizes per doubling."""
    tiles = max(1, -(-length // TILE))
    step = max(1, (1 << (tiles - 1).bit_length()) // (2 * per_doubling))
    return -(-tiles // step) * step
