"""Keys and values travel to the ranks that see them, and their gradients back to the ranks that own them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from swat_flex.distributed.agreement import lost
from swat_flex.distributed.shards import Halo, Piece

Messages = list[tuple[int, Tensor]]  # (rank of the group, contiguous tensor)
Keys = tuple[Tensor, Tensor, Tensor | None]  # k, v and document ids of some tokens


class Exchange:
    """The traffic of one call on one rank.

    Forward: `begin`, then the rows that need no halo, then `end`. Autograd runs the latest node that is ready, so the
    backward pass mirrors it: what `end` returned sends its gradients away, then the gradients of the other rows are
    computed, then `begin` adds what came back to those of k and v.
    """

    def __init__(self, halo: Halo, group: dist.ProcessGroup, own: Keys) -> None:
        k, v, _ = own
        self.halo = halo
        self.group = group
        self.heads, self.dims = k.shape[:2], (k.shape[3], v.shape[3])
        self.posted: _Posted | None = None
        self.returning: _Posted | None = None

    def begin(self, own: Keys) -> tuple[Keys, Tensor]:
        """Post the halo's messages. Returns this rank's own keys for all further use, and a token for `end`."""
        k, v, ids = own
        k, v, token = _Begin.apply(self, k, v, ids)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return (k, v, ids), token

    def end(self, token: Tensor) -> list[Keys]:
        """Wait for the halo. Returns its pieces in token order."""
        assert self.posted is not None
        messages, self.posted = self.posted.wait(), None
        pieces = len(self.halo.received)
        if not pieces:
            return []
        parts = _End.apply(self, token, messages[:pieces])  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        ids: Sequence[Tensor | None] = messages[pieces:] or [None] * pieces
        return list(zip(parts[::2], parts[1::2], ids, strict=True))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Wait for the halo's messages even if an exception ends the work that runs meanwhile.

        Checkpointing stops a recomputation with an exception as soon as a rank has what it needs. Without the wait, its
        messages would never reach the ranks that still need them.
        """
        try:
            yield
        except BaseException:
            if self.posted is not None:
                with contextlib.suppress(RuntimeError):  # the first error says more
                    self.posted.wait()
            raise

    def post(self, k: Tensor, v: Tensor, ids: Tensor | None) -> None:
        """Send to each rank that sees some of this shard; receive from each rank whose keys this one sees."""
        sent = [(piece.peer, self._pack(_of(piece, k), _of(piece, v))) for piece in self.halo.sent]
        received = [(piece.peer, self._message(piece, k)) for piece in self.halo.received]
        if ids is not None:
            sent += [(piece.peer, ids[..., piece.start : piece.stop].contiguous()) for piece in self.halo.sent]
            received += [(piece.peer, ids.new_empty(*ids.shape[:-1], piece.tokens)) for piece in self.halo.received]
        self.posted = _Posted(sent, received, "exchanging keys", self.group)

    def post_back(self, gradients: tuple[Tensor, ...], like: Tensor) -> None:
        """Send the gradients of the received pieces (k's, v's, k's, v's, …) to their owners."""
        pairs = zip(gradients[::2], gradients[1::2], strict=True)
        sent = [(piece.peer, self._pack(*pair)) for piece, pair in zip(self.halo.received, pairs, strict=True)]
        received = [(piece.peer, self._message(piece, like)) for piece in self.halo.sent]
        self.returning = _Posted(sent, received, "returning the gradients of keys", self.group)

    def add_returned(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """Add to dk and dv of this shard what the ranks that saw it return, in rank order, and round once."""
        if self.returning is None:  # this rank received no halo, so nothing started the way back
            self.post_back((), dk)
        assert self.returning is not None
        messages, self.returning = self.returning.wait(), None
        if not messages:
            return dk, dv
        start = min(piece.start for piece in self.halo.sent)
        stop = max(piece.stop for piece in self.halo.sent)
        wide = torch.promote_types(dk.dtype, torch.float32)
        sums = [d[:, :, start:stop].to(wide, copy=True) for d in (dk, dv)]
        for piece, message in zip(self.halo.sent, messages, strict=True):
            for total, part in zip(sums, self.unpack(message), strict=True):
                total[:, :, piece.start - start : piece.stop - start] += part
        results = dk.clone(), dv.clone()  # autograd may use a gradient elsewhere
        for result, total in zip(results, sums, strict=True):
            result[:, :, start:stop] = total
        return results

    def unpack(self, message: Tensor) -> tuple[Tensor, Tensor]:
        """Split a message into keys `[B, Hkv, tokens, D]` and values `[B, Hkv, tokens, Dv]`."""
        rows = message.numel() // sum(self.dims)
        k, v = torch.split(message, [rows * dim for dim in self.dims])
        return k.view(*self.heads, -1, self.dims[0]), v.view(*self.heads, -1, self.dims[1])

    def _pack(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([k.reshape(-1), v.reshape(-1)])

    def _message(self, piece: Piece, like: Tensor) -> Tensor:
        return like.new_empty(self.heads.numel() * piece.tokens * sum(self.dims))


def _of(piece: Piece, x: Tensor) -> Tensor:
    return x[:, :, piece.start : piece.stop]


class _Begin(torch.autograd.Function):
    """Pass k and v on and send their edges away; in the backward pass add the gradients that come back."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, k: Tensor, v: Tensor, ids: Tensor | None) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        exchange.post(k, v, ids)
        return k.view_as(k), v.view_as(v), k.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk: Tensor, dv: Tensor, _token: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.add_returned(dk, dv), None


class _End(torch.autograd.Function):
    """Hand out the received pieces (k's, v's, k's, v's, …); in the backward pass send their gradients away."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, token: Tensor, messages: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(part for message in messages for part in exchange.unpack(message))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.exchange.post_back(gradients, gradients[0])
        return None, gradients[0].new_empty(0), None


class _Posted:
    """Messages on their way. Two ranks post their messages to each other in the same order: keys first, then ids."""

    def __init__(self, sent: Messages, received: Messages, doing: str, group: dist.ProcessGroup) -> None:
        self.sent, self.received = sent, received  # kept until `wait`: the transport reads and writes them
        self.doing, self.group = doing, group
        calls = [(dist.irecv, message) for message in received] + [(dist.isend, message) for message in sent]
        operations = [
            dist.P2POp(call, tensor, group=group, group_peer=peer) for call, (peer, tensor) in calls if tensor.numel()
        ]
        self.works: list[Any] = []
        with lost(doing, self._peers(), group):
            self.works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> list[Tensor]:
        """Return what was received, in the order it was asked for."""
        with lost(self.doing, self._peers(), self.group):
            for work in self.works:
                work.wait()
        return [tensor for _, tensor in self.received]

    def _peers(self) -> set[int]:
        return {peer for peer, _ in self.sent + self.received}
