"""How `banded` cuts a call into tiles, and what happens to one tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from swat_flex.operands import Operands
from swat_flex.positions import per_head_dtype
from swat_flex.window import Window


@dataclass(frozen=True, slots=True)
class BandedConfig:
    """How the band is cut.

    block: query rows of one head in a tile; more multiply better, fewer waste less at the window's two edges.
    tile: scores in a tile, all its heads together (elements); it should stay in the caches.
    segment: blocks whose keys are converted or made contiguous at once, where the inputs need that.
    """

    block: int = 64
    tile: int = 2**20
    segment: int = 16

    def is_valid(self) -> bool:
        return self.block >= 1 and self.tile >= 1 and self.segment >= 1


def configuration(window: Window) -> BandedConfig:
    """Choose the default: wide windows afford more rows per block."""
    width = (window.left or 0) + (window.right or 0)
    return BandedConfig(block=96 if None in (window.left, window.right) or width >= 384 else 64)


HeadSlice = tuple[slice, slice]  # batches, key heads


class Band:
    """One call cut into tiles: a head slice (G batches × key heads), a block of query rows, a chunk of keys.

    Column c of row r is the key at distance i − j = r − c + padded_left. That holds in every block of the sequence, so
    the distances, and the two hidden triangles at the window's edges, are made once. `padded_left` is the window's left
    side rounded up until a full tile is a multiple of 16 columns wide, which matrix products prefer.
    """

    def __init__(self, operands: Operands, config: BandedConfig) -> None:
        q, k, ids = operands.q, operands.k, operands.document_ids
        self.batch, q_heads, self.q_len, _ = q.shape
        self.kv_heads, self.kv_len = k.shape[1:3]
        self.group = q_heads // self.kv_heads
        self.offset = self.kv_len - self.q_len
        self.scale, self.segment = operands.scale, config.segment
        self.softmax = operands.activation == "softmax"
        self.dtype = per_head_dtype(q)
        self.bits = torch.int64 if q.dtype == torch.float64 else torch.int32

        left, self.right = operands.window.clamped(self.q_len, self.kv_len)
        self.block = block = min(config.block, self.q_len)
        columns = -(-(block + left + self.right) // 16) * 16
        self.padded_left = columns - block - self.right
        row = torch.arange(block, device=q.device)[:, None]
        distance = row - torch.arange(columns, device=q.device) + self.padded_left
        self.distance = distance.abs().to(self.dtype)  # [block, columns], tokens
        self.left_edge = block + self.padded_left - left  # columns from here on are within the left side for every row
        self.right_edge = columns - block + 1  # columns before are within the right side for every row
        self.in_left = -(distance[:, : self.left_edge] <= left).to(self.bits)
        self.in_right = -(distance[:, self.right_edge :] >= -self.right).to(self.bits)

        self.slopes, self.logit_bias = (
            None if x is None else x.to(self.dtype)[:, None, None] for x in (operands.slopes, operands.logit_bias)
        )
        self.q_ids = self.k_ids = None
        if ids is not None:  # a query of padding (−1) meets no key, not even one of padding (−2)
            ids = ids.expand(self.batch, self.kv_len)
            self.q_ids = torch.where(ids < 0, -1, ids)[:, self.offset :, None]
            self.k_ids = torch.where(ids < 0, -2, ids)[:, None, :]

        # A softmax needs its whole row in one tile; a sigmoid may stop at any key.
        widest = min(columns, self.kv_len)
        self.chunk = widest if self.softmax else min(widest, 1024)
        fitting = max(1, config.tile // (self.group * block * self.chunk))
        if q.dtype != self.dtype:  # gradients of converted keys are summed apart: at most 64 MiB of them at a time
            fitting = min(fitting, max(1, 2**24 // (self.kv_len * (q.shape[3] + operands.v.shape[3]))))
        self.heads = _even_share(self.kv_heads, fitting)
        self.batches = _even_share(self.batch, max(1, fitting // self.kv_heads))
        self.buffers: dict[str, Tensor] = {}

    def head_slices(self) -> Iterator[HeadSlice]:
        """Yield the head slices; several batches share one only where all heads fit, so that the two axes merge."""
        for b in range(0, self.batch, self.batches):
            for h in range(0, self.kv_heads, self.heads):
                yield slice(b, min(b + self.batches, self.batch)), slice(h, min(h + self.heads, self.kv_heads))

    def segments(self) -> Iterator[tuple[list[slice], slice]]:
        """Yield (blocks of query rows, the keys they meet together)."""
        step = self.block * self.segment
        for first in range(0, self.q_len, step):
            last = min(first + step, self.q_len)
            rows = [slice(r, min(r + self.block, last)) for r in range(first, last, self.block)]
            yield rows, self.span(slice(first, last))

    def span(self, rows: slice) -> slice:
        """Return the keys whose columns exist for these rows; they may start up to 15 keys before the window does."""
        first, last = self.offset + rows.start - self.padded_left, self.offset + rows.stop + self.right
        return slice(max(0, first), min(self.kv_len, last))

    def chunks(self, rows: slice) -> Iterator[slice]:
        span = self.span(rows)
        for first in range(span.start, span.stop, self.chunk):
            yield slice(first, min(first + self.chunk, span.stop))

    def q_heads(self, part: HeadSlice) -> slice:
        return slice(part[1].start * self.group, part[1].stop * self.group)

    def keys(self, x: Tensor, part: HeadSlice, keys: slice) -> Tensor:
        """Take `[G, keys, D]` in the compute dtype: a view where the layout allows it."""
        x = x[part[0], part[1], keys].flatten(0, 1).to(self.dtype)
        return x if x.stride(-1) == 1 else x.contiguous()

    def rows(self, x: Tensor, part: HeadSlice, rows: slice) -> Tensor:
        """Take `[G, group·rows, D]` in the compute dtype: the query heads of a key head, one below the other."""
        x = x[part[0], self.q_heads(part), rows].to(self.dtype)
        return x.reshape(-1, self.group * x.shape[2], x.shape[3])

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Return contiguous scratch memory with old contents; reuse spares each tile the page faults of new memory."""
        size = torch.Size(shape).numel()
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.distance.device)
        return self.buffers[name][:size].view(shape)

    def by_head(self, tile: Tensor, part: HeadSlice, rows: slice) -> Tensor:
        """View a tile `[G, group·rows, keys]` as `[batches, query heads, rows, keys]`."""
        heads = self.q_heads(part)
        return tile.view(-1, heads.stop - heads.start, rows.stop - rows.start, tile.shape[2])

    def weights(self, q: Tensor, k: Tensor, part: HeadSlice, rows: slice, keys: slice) -> Tensor:
        """Compute σ(x) or softmax(x) of a tile, exactly 0 where hidden: `[G, group·rows, keys]`."""
        x = self.buffer("weights", q.shape[0], q.shape[1], k.shape[1])
        logits, heads = self.by_head(x, part, rows), self.q_heads(part)
        if self.slopes is not None:
            torch.mul(self.distances(rows, keys).expand(len(logits), 1, -1, -1), self.slopes[heads], out=logits)
            if self.logit_bias is not None:
                logits.add_(self.logit_bias[heads])
        elif self.logit_bias is not None:
            logits.copy_(self.logit_bias[heads])
        biased = self.slopes is not None or self.logit_bias is not None
        x.baddbmm_(q, k.transpose(1, 2), beta=int(biased), alpha=self.scale)
        if not self.softmax:
            return self.hide(x.sigmoid_(), part, rows, keys)
        visible = self.hide(torch.ones_like(logits[:, :1]), part, rows, keys)
        self.hide(x, part, rows, keys)
        logits.add_(visible.log_())  # hidden: 0 + log 0 = −∞
        torch.softmax(x, -1, out=x)
        return self.hide(x, part, rows, keys)  # a row that sees nothing is NaN until here

    def distances(self, rows: slice, keys: slice) -> Tensor:
        column = self.column(rows, keys)
        return self.distance[: rows.stop - rows.start, column : column + keys.stop - keys.start]

    def column(self, rows: slice, keys: slice) -> int:
        return int(keys.start) - (self.offset + int(rows.start) - self.padded_left)

    def hide(self, x: Tensor, part: HeadSlice, rows: slice, keys: slice) -> Tensor:
        """Write 0 over a tile's hidden elements, whatever they hold; a product with 0 would let NaN through."""
        n_rows, first = rows.stop - rows.start, self.column(rows, keys)
        last = first + keys.stop - keys.start
        bits = x.view(self.bits).view(part[0].stop - part[0].start, -1, n_rows, last - first)
        if first < self.left_edge:
            end = min(last, self.left_edge)
            bits[..., : end - first].bitwise_and_(self.in_left[:n_rows, first:end])
        if last > self.right_edge:
            start = max(first, self.right_edge)
            in_right = self.in_right[:n_rows, start - self.right_edge : last - self.right_edge]
            bits[..., start - first :].bitwise_and_(in_right)
        if self.q_ids is not None and self.k_ids is not None:
            same = self.q_ids[part[0], rows] == self.k_ids[part[0], :, keys]
            bits.bitwise_and_(-same.to(self.bits)[:, None])
        return x

    def accumulator(self, gradient: Tensor, part: HeadSlice) -> Tensor:
        """Return `[G, Lk, D]` zeros in the compute dtype: the gradient itself where it has that dtype."""
        if gradient.dtype == self.dtype:
            return gradient[part].flatten(0, 1)
        return torch.zeros_like(gradient[part], dtype=self.dtype).flatten(0, 1)

    def add_keys(self, to: Tensor, tile: Tensor, rows: Tensor, scale: float = 1.0) -> None:
        """Add scale · tileᵀ rows to `to`: each query head's product apart, then summed.

        One product over all the rows of a group would round more; one straight into `to`, whose batches lie apart,
        would run batch by batch.
        """
        heads = to.shape[0] * self.group
        tile, rows = tile.view(heads, -1, to.shape[1]), rows.reshape(heads, -1, to.shape[2])
        product = torch.bmm(tile.transpose(1, 2), rows, out=self.buffer("keys", heads, *to.shape[1:]))
        if self.group > 1:
            product = product.view(-1, self.group, *to.shape[1:]).sum(1)
        to.add_(product, alpha=scale)

    def logit_gradient(
        self, weights: Tensor, grad: Tensor, v: Tensor, part: HeadSlice, rows: slice, keys: slice
    ) -> Tensor:
        """Compute ∂/∂x of a tile: dw · w(1 − w) for the sigmoid, w(dw − Σ dw·w) for the softmax, with dw = grad vᵀ."""
        x = torch.bmm(grad, v.transpose(1, 2), out=self.buffer("logits", *weights.shape))
        if not self.softmax:
            torch.ops.aten.sigmoid_backward.grad_input(x, weights, grad_input=x)
            return self.hide(x, part, rows, keys)
        self.hide(x, part, rows, keys)
        # Σ w = 1, so dw may be counted from any number. From its mean, where one weight is near 1, dw − Σ dw·w loses
        # to rounding a share of what dw is apart, not of dw itself; the second time takes what the first mean lost.
        for _ in range(2):
            products = torch.mul(x, weights, out=self.buffer("products", *weights.shape))
            x.sub_(products.sum(-1, keepdim=True))
        return self.hide(x.mul_(weights), part, rows, keys)

    def per_head_sums(self, dlogits: Tensor, part: HeadSlice, rows: slice, keys: slice) -> Tensor:
        """Sum dx·|i − j| (slopes) and dx (logit bias) over a tile: `[2, query heads]`."""
        x = self.by_head(dlogits, part, rows)
        return torch.stack(((x * self.distances(rows, keys)).sum((0, 2, 3)), x.sum((0, 2, 3))))


def _even_share(items: int, fitting: int) -> int:
    """Return the items of a share: as few shares as fit, as even as can be."""
    shares = -(-items // fitting)
    return -(-items // shares)
