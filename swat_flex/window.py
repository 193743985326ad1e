"""The sliding window: which keys a query sees, how many pairs that makes, which keys a block of rows touches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """Query i sees key j when −right ≤ i − j ≤ left; None leaves a side unbounded.

    The last query and the last key share a position, so query row r of `q_len` sits at `kv_len − q_len + r`.
    """

    left: int | None
    right: int | None

    @classmethod
    def of(cls, window: int | tuple[int | None, int | None] | None) -> Window:
        """Read the argument of `flex_swat`: an int counts the keys 0 ≤ i − j < window, None is plain causal."""
        if window is None:
            return cls(None, 0)
        if isinstance(window, tuple):
            return cls(*window)
        return cls(window - 1, 0)

    def sees(self, distance: Tensor) -> Tensor:
        """Return a bool mask of the same shape as `distance` = i − j (tokens)."""
        visible = distance == distance
        if self.left is not None:
            visible = visible & (distance <= self.left)
        if self.right is not None:
            visible = visible & (distance >= -self.right)
        return visible

    def clamped(self, q_len: int, kv_len: int) -> tuple[int, int]:
        """Return (left, right) as numbers, no larger than any distance that occurs."""
        left = kv_len - 1 if self.left is None else min(self.left, kv_len - 1)
        right = q_len - 1 if self.right is None else min(self.right, q_len - 1)
        return max(left, 0), max(right, 0)

    def keys(self, first: int, last: int, q_len: int, kv_len: int) -> tuple[int, int]:
        """Return the range [start, stop) of the keys that any query row in [first, last) sees."""
        left, right = self.clamped(q_len, kv_len)
        offset = kv_len - q_len
        return max(0, offset + first - left), min(kv_len, offset + last + right)

    def pairs(self, q_len: int, kv_len: int) -> int:
        """Count the visible (query, key) pairs of one head exactly, documents apart."""
        left, right = self.clamped(q_len, kv_len)
        backward = _sum_of_minimum(kv_len - q_len, kv_len, left)
        forward = _sum_of_minimum(0, q_len, right)
        return backward + forward + q_len


def _sum_of_minimum(start: int, stop: int, limit: int) -> int:
    """Σ min(p, limit) over start ≤ p < stop."""
    knee = min(max(limit, start), stop)
    return (knee * (knee - 1) - start * (start - 1)) // 2 + (stop - knee) * limit
