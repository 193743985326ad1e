"""Who needs which keys: a sequence cut into contiguous shards, one per rank, under a window."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from swat_flex.window import Window


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of a shard, counted from its first, that travel between its owner and `peer`."""

    peer: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Halo:
    """What one rank receives and sends. Between two ranks at most one piece travels each way.

    left, right: pieces of the ranks before and after, in token order; `Piece.peer` owns them.
    sent: pieces of this rank's own shard, in the order of the ranks that want them; `Piece.peer` wants them.
    """

    left: tuple[Piece, ...]
    right: tuple[Piece, ...]
    sent: tuple[Piece, ...]

    @property
    def received(self) -> tuple[Piece, ...]:
        return self.left + self.right


@functools.lru_cache(maxsize=64)
def halo_of(rank: int, lengths: tuple[int, ...], window: Window) -> Halo:
    """The halo of a rank; `lengths` are tokens per rank."""
    left, right = _wanted(rank, lengths, window)
    sent = []
    for other in range(len(lengths)):
        pieces = (piece for side in _wanted(other, lengths, window) for piece in side if piece.peer == rank)
        sent += [Piece(other, piece.start, piece.stop) for piece in pieces]
    return Halo(left, right, tuple(sent))


def _wanted(rank: int, lengths: tuple[int, ...], window: Window) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """List the pieces that a rank wants from the ranks before it and after it."""
    starts = (0, *itertools.accumulate(lengths))
    first, last, total = starts[rank], starts[rank + 1], starts[-1]
    if first == last:  # no queries, no keys needed
        return (), ()
    begin = 0 if window.left is None else max(first - window.left, 0)
    end = total if window.right is None else min(last + window.right, total)
    return _cut(begin, first, starts), _cut(last, end, starts)


def _cut(begin: int, end: int, starts: tuple[int, ...]) -> tuple[Piece, ...]:
    """Cut tokens [begin, end) of the sequence into pieces of the shards they lie in."""
    pieces = []
    for owner, (first, last) in enumerate(itertools.pairwise(starts)):
        start, stop = max(begin, first), min(end, last)
        if start < stop:
            pieces.append(Piece(owner, start - first, stop - first))
    return tuple(pieces)
