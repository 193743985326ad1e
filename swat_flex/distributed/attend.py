"""`context_parallel_swat`: `flex_swat` of a sequence whose shards lie on the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from swat_flex import dispatch, validation
from swat_flex.api import flex_swat
from swat_flex.distributed.agreement import Mesh, agree, group_of, refuse
from swat_flex.distributed.exchange import Exchange, Keys
from swat_flex.distributed.shards import Halo, halo_of
from swat_flex.problem import Activation, Backend, Slopes, WindowLike
from swat_flex.window import Window

# From the queries of some rows, and keys, values and ids that they see, to the rows' output.
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


# Messages and their order are no graph: a compiled caller breaks here.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's own
def context_parallel_swat(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: WindowLike,
    *,
    mesh: Mesh,
    slopes: Slopes = "balanced",
    scale: float | None = None,
    logit_bias: Tensor | float | None = None,
    document_ids: Tensor | None = None,
    activation: Activation = "sigmoid",
    backend: Backend = "auto",
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """This rank's rows of `flex_swat` over the sequence that all ranks of the mesh hold together.

    Query i sees key j when 0 ≤ i − j < window, wherever the two lie. Each rank receives the keys and values that its
    queries see and it does not hold, and computes the rows that need none meanwhile; the backward pass returns their
    gradients. Same result as one process, to rounding; the same bits in every run.

    Every rank makes the same calls in the same order, forward and backward. The gradients of k and v are complete.
    Those of slopes and logit_bias are this rank's part: the whole is their sum over the mesh, as for any replicated
    parameter.

    Args:
        q: `[B, Hq, n, D]`, this rank's tokens. Ranks hold contiguous shards in rank order, of any lengths n ≥ 0.
        k: `[B, Hkv, n, D]`, the same tokens.
        v: `[B, Hkv, n, Dv]`.
        window: as `flex_swat`. A right side fetches keys from the ranks after; None fetches every key on that side.
        mesh: a DeviceMesh of one dimension (`mesh["context"]` of a larger one), or its process group.
        slopes, scale, logit_bias, activation, backend: as `flex_swat`, the same on every rank.
        document_ids: signed ints `[B, n]` or `[n]` of this rank's tokens; equal ids on two ranks are one document.
        lengths: n of every rank, from `shard_lengths`. None compares the arguments of all ranks first, one small
            all-gather per call. With lengths nothing is compared: ranks that differ hang or fail in the transport.

    Returns:
        `[B, Hq, n, Dv]`, this rank's rows, in q's dtype and its axes in memory in q's order.

    Raises:
        TypeError, ValueError, NotImplementedError: as `flex_swat`; ValueError on every rank where they differ in more
            than n or one of them refused its arguments.
        RuntimeError: a rank died or made another call: within the group's timeout where the transport reports it
            (gloo does; NCCL's watchdog ends the process).
    """
    group = group_of(mesh)
    try:
        operands = validation.resolve(q, k, v, window, slopes, scale, logit_bias, document_ids, activation, backend)
        dispatch.choose(operands.problem(), backend)
        q, k, v = operands.q, operands.k, operands.v
        if q.shape[2] != k.shape[2]:
            raise ValueError(f"q: expected k's {k.shape[2]} tokens on every rank, got {q.shape[2]}")
        if lengths is not None:
            _check_lengths(lengths, q.shape[2], group)
    except (TypeError, ValueError, NotImplementedError):
        if lengths is None:
            refuse(group, q.device if isinstance(q, Tensor) else torch.device("cpu"))
        raise
    needs_grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if lengths is None:
        lengths = agree(operands, needs_grad, group)

    def attend(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None) -> Tensor:
        return flex_swat(
            q, k, v, window, slopes=slopes, scale=scale, logit_bias=logit_bias, document_ids=ids, activation=activation,
            backend=backend,
        )  # fmt: skip

    own = k, v, document_ids
    halo = halo_of(dist.get_rank(group), tuple(lengths), operands.window)
    return attend_shard(q, own, operands.window, halo, Exchange(halo, group, own), attend)


def _check_lengths(lengths: Sequence[int], here: int, group: dist.ProcessGroup) -> None:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(lengths) != ranks:
        raise ValueError(f"lengths: expected one per rank, {ranks} of them, got {len(lengths)}")
    if lengths[rank] != here:
        raise ValueError(f"lengths: expected q's {here} tokens on rank {rank}, got {lengths[rank]}")


def attend_shard(q: Tensor, own: Keys, window: Window, halo: Halo, exchange: Exchange, attend: Attend) -> Tensor:
    """Attend rows [first, last), which see no key of another rank, while the halo travels; then the others."""
    n = q.shape[2]
    left_side, right_side = (n if side is None else min(side, n) for side in (window.left, window.right))
    first = left_side if halo.left else 0
    last = n - right_side if halo.right else n
    own, token = exchange.begin(own)
    with exchange.kept():
        inside = first < last or not halo.received
        interior = _rows(q, own, 0, first, last, window, attend) if inside else None
    pieces = exchange.end(token)
    if interior is not None and not pieces:
        return interior
    left, right = pieces[: len(halo.left)], pieces[len(halo.left) :]
    before = sum(piece.tokens for piece in halo.left)
    if interior is None:
        return _rows(q, _concatenated([*left, own, *right]), before, 0, n, window, attend)
    parts = [interior]
    if left:
        keys = _concatenated([*left, _tokens(own, 0, first + right_side)])
        parts.insert(0, _rows(q, keys, before, 0, first, window, attend))
    if right:
        start = last - left_side if last > left_side else 0
        keys = _concatenated([_tokens(own, start, n), *right])
        parts.append(_rows(q, keys, -start, last, n, window, attend))
    return _joined(parts, q)


def _rows(q: Tensor, keys: Keys, before: int, first: int, last: int, window: Window, attend: Attend) -> Tensor:
    """Rows [first, last) of the shard, `[B, Hq, last − first, Dv]`, over those of the given keys that they see.

    `before` of the keys come before the shard's first token. The last query and the last key of a call share a
    position; where a window looks right the last key lies up to `right` tokens after the last row, so the queries up to
    it are computed too, the shard's own, then zeros, and dropped.
    """
    n, total = q.shape[2], keys[0].shape[2]
    begin = 0 if window.left is None else max(before + first - window.left, 0)
    end = total if window.right is None else min(before + last + window.right, total)
    stop = end - before
    q = F.pad(q[:, :, first : min(stop, n)], (0, 0, 0, max(stop - n, 0)))
    return attend(q, *_tokens(keys, begin, end))[:, :, : last - first]


def _tokens(keys: Keys, start: int, stop: int) -> Keys:
    k, v, ids = keys
    return k[:, :, start:stop], v[:, :, start:stop], None if ids is None else ids[..., start:stop]


def _concatenated(pieces: list[Keys]) -> Keys:
    """Concatenate pieces along the tokens."""
    k, v, ids = zip(*pieces, strict=True)
    return torch.cat(k, 2), torch.cat(v, 2), None if ids[0] is None else torch.cat(ids, -1)


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    """Concatenate parts along the tokens, with axes in memory in the order of `like`."""
    order = sorted(range(4), key=like.stride, reverse=True)
    back = [order.index(axis) for axis in range(4)]
    return torch.cat([part.permute(order) for part in parts], order.index(2)).permute(back)
