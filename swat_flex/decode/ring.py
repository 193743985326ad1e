"""`RingCache`: the keys and values that a window still sees, in constant memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swat_flex.validation import DTYPES, MAX_HEAD_DIM, autocasts, check_like, check_tensor

MAX_QUERIES = 16


class RingCache(torch.nn.Module):
    """The newest keys and values of each row of a batch: position p lives in slot p % slots, whatever the length.

    Rows have lengths of their own: left padding, mixed lengths and finished rows are tokens that `append` skips.
    Everything happens in place on buffers of fixed size and reads no value on the host, so that a step can be compiled
    once and captured in a CUDA graph. A module, so that `state_dict`, `to`, pickle and deepcopy do what they say; it
    has no parameters and no gradient.

    >>> cache = RingCache(batch=1, heads=2, window=4, head_dim=8)
    >>> cache.append(torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8))
    >>> cache.length, cache.keys.shape
    (tensor([6]), torch.Size([1, 2, 4, 8]))

    Args:
        batch: rows.
        heads: key heads.
        window: keys per query, its own included (tokens).
        head_dim: D, 1 to 256.
        value_dim: Dv, 1 to 256; None is D.
        dtype: float32, bfloat16, float16, or float64 on a CPU.
        device: where the buffers are.
        queries: most new tokens that one `swat_decode` attends at once, 1 to 16; each beyond the first costs a slot.

    Attributes:
        keys: `[B, heads, slots, D]`, slots = window + queries − 1; what a slot not yet reached holds does not matter.
        values: `[B, heads, slots, Dv]`.
        length: `[B]` int64, tokens appended to each row so far, which is the position of its next one.

    Raises:
        TypeError, ValueError: an argument that breaks a rule above.
    """

    keys: Tensor
    values: Tensor
    length: Tensor

    def __init__(
        self,
        batch: int,
        heads: int,
        window: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        *,
        queries: int = 1,
    ) -> None:
        super().__init__()
        value_dim = head_dim if value_dim is None else value_dim
        _check_int("batch", batch, 0)
        _check_int("heads", heads, 1)
        _check_int("window", window, 1)
        _check_int("head_dim", head_dim, 1, MAX_HEAD_DIM)
        _check_int("value_dim", value_dim, 1, MAX_HEAD_DIM)
        _check_int("queries", queries, 1, MAX_QUERIES)
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
        self.window, self.queries, self.slots = window, queries, window + queries - 1
        with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
            shape = (batch, heads, self.slots)
            keys = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
            if dtype == torch.float64 and keys.device.type not in ("cpu", "meta"):
                raise ValueError(f"dtype: expected float64 on a CPU only, got it on {keys.device}")
            self.register_buffer("keys", keys)
            self.register_buffer("values", torch.zeros(*shape, value_dim, dtype=dtype, device=device))
            self.register_buffer("length", torch.zeros(batch, dtype=torch.int64, device=device))

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        """Write T new tokens of every row over its oldest ones; any T.

        Gradients do not flow into a cache: it keeps the numbers alone.

        Args:
            k: `[B, heads, T, D]` in the cache's dtype (cast to it under autocast).
            v: `[B, heads, T, Dv]`.
            mask: bool `[B, T]`; tokens that are False are skipped and do not count as positions. None keeps all.
        """
        k, v = self.cast(k), self.cast(v)
        self.check(k, v, mask)
        with torch.no_grad():
            tokens = k.shape[2]
            written = min(tokens, self.slots)
            rank = torch.arange(tokens - written, tokens, device=self.length.device)
            if mask is None:
                self._write(self.length[:, None] + rank, k[:, :, tokens - written :], v[:, :, tokens - written :], None)
                self.length.add_(tokens)
                return
            # Kept tokens first, so that `written` ranks in a row cover the newest of them and distinct slots; a rank
            # beyond the kept ones writes back what its slot holds.
            kept = mask.sum(1, keepdim=True)
            rank = (kept - self.slots).clamp_(min=0) + torch.arange(written, device=mask.device)  # [B, written]
            order = kept_first(mask).gather(1, rank)
            self._write(self.length[:, None] + rank, take_tokens(k, order), take_tokens(v, order), rank < kept)
            self.length.add_(kept[:, 0])

    def _write(self, position: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Write k, v `[B, heads, T, ·]` to `position` `[B or 1, T]`, in distinct slots, where the mask is True."""
        batch, heads = self.keys.shape[:2]
        device = position.device
        slot = (position % self.slots)[:, None]  # [B, 1, T]
        row, head = torch.arange(batch, device=device)[:, None, None], torch.arange(heads, device=device)[:, None]
        for ring, new in ((self.keys, k), (self.values, v)):
            kept = new if mask is None else torch.where(mask[:, None, :, None], new, ring[row, head, slot])
            ring.index_put_((row, head, slot), kept)

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty the cache, or some rows: bool `[B]` or int `[N]`."""
        if rows is None:
            self.length.zero_()
            return
        if not isinstance(rows, Tensor):
            raise TypeError(f"rows: expected a torch.Tensor or None, got {type(rows).__name__}")
        if rows.dim() != 1 or rows.is_floating_point() or (rows.dtype == torch.bool and len(rows) != len(self.length)):
            expected = f"bool [{len(self.length)}] or int [N]"
            raise ValueError(f"rows: expected {expected}, got {rows.dtype} of shape {list(rows.shape)}")
        if rows.dtype == torch.bool:
            self.length.masked_fill_(rows, 0)
        else:
            self.length.index_fill_(0, rows.long(), 0)

    def reorder(self, index: Tensor) -> None:
        """Make row b what row index[b] was, as a beam search does with the beams that go on. index: int `[B]`."""
        check_tensor("index", index)
        if index.dtype not in (torch.int32, torch.int64) or index.shape != self.length.shape:
            expected = f"int32 or int64 [{len(self.length)}]"
            raise ValueError(f"index: expected {expected}, got {index.dtype} of shape {list(index.shape)}")
        with torch.no_grad():
            for buffer in (self.keys, self.values, self.length):
                buffer.copy_(buffer.index_select(0, index))

    def positions(self, tokens: int, mask: Tensor | None = None) -> Tensor:
        """`[B, tokens]` int64: positions of the tokens that the next `append` gets, for `apply_rope`.

        With a mask as in `append`, those of the kept tokens; a skipped one has the position of the kept one before it.
        """
        if mask is None:
            return self.length[:, None] + torch.arange(tokens, device=self.length.device)
        return self.length[:, None] + mask.cumsum(1) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers; they never change."""
        return sum(buffer.nbytes for buffer in (self.keys, self.values, self.length))

    def extra_repr(self) -> str:
        batch, heads, _, head_dim = self.keys.shape
        return (
            f"batch={batch}, heads={heads}, window={self.window}, head_dim={head_dim}, "
            f"value_dim={self.values.shape[3]}, dtype={self.keys.dtype}, queries={self.queries}"
        )

    def cast(self, x: Any) -> Any:
        """Cast a tensor to the cache's dtype under autocast, which leaves q, k and v in different dtypes."""
        if isinstance(x, Tensor) and autocasts(self.keys.device.type):
            return x.to(self.keys.dtype)
        return x

    def check(self, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Check that k, v and mask fit; raises for the first rule broken."""
        batch, heads = self.keys.shape[:2]
        for name, x, ring in (("k", k, self.keys), ("v", v, self.values)):
            check_tensor(name, x)
            if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, ring.shape[3]):
                raise ValueError(f"{name}: expected shape [{batch}, {heads}, T, {ring.shape[3]}], got {list(x.shape)}")
            check_like(name, x, ring, "the cache's")
        if v.shape[2] != k.shape[2]:
            raise ValueError(f"v: expected k's {k.shape[2]} tokens, got {v.shape[2]}")
        if mask is None:
            return
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a torch.Tensor or None, got {type(mask).__name__}")
        if mask.dtype != torch.bool or tuple(mask.shape) != (batch, k.shape[2]):
            expected = f"bool of shape [{batch}, {k.shape[2]}]"
            raise ValueError(f"mask: expected {expected}, got {mask.dtype} of shape {list(mask.shape)}")
        if mask.device != k.device:
            raise ValueError(f"mask: expected the cache's device {k.device}, got {mask.device}")


def kept_first(mask: Tensor) -> Tensor:
    """Order of each row's tokens, `[B, T]`: those of the mask first, each part in its old order."""
    if mask.shape[1] == 1:
        return torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    return mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens `index` `[B, N]` of x `[B, H, T, D]`, row by row: `[B, H, N, D]`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _check_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ValueError(
            f"{name}: expected {f'at least {least}' if most is None else f'{least} to {most}'}, got {value}"
        )
