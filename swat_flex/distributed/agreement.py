"""What the ranks agree on before anything travels, so that a mistake on one of them is an error on all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from swat_flex.operands import Operands
from swat_flex.validation import DTYPES, ID_DTYPES

Mesh = DeviceMesh | dist.ProcessGroup

# What a call says of itself, in the order it is sent: (argument, what must be the same on every rank).
_FIELDS = (
    ("q", "batch size"),
    ("q", "number of heads"),
    ("k", "number of heads"),
    ("q", "head dimension"),
    ("v", "head dimension"),
    ("q", "dtype"),
    ("window", "left side"),
    ("window", "right side"),
    ("document_ids", "number of dimensions (0 is None)"),
    ("document_ids", "dtype"),
    ("k, v", "requires_grad"),
)


def group_of(mesh: Mesh) -> dist.ProcessGroup:
    """The process group of a one-dimensional mesh, or the group itself.

    Raises:
        TypeError: something else.
        ValueError: a mesh of several dimensions, or one this process is not in.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"mesh: expected one dimension, such as mesh['context'], got {mesh.ndim} of {mesh}")
        if mesh.get_coordinate() is None:
            raise ValueError(f"mesh: expected a mesh that holds this process, rank {dist.get_rank()}, got {mesh}")
        return mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"mesh: expected a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    return mesh


def local_shard(x: Tensor, mesh: Mesh, dim: int) -> Tensor:
    """This rank's contiguous part of a tensor that every rank holds whole: a view, `torch.tensor_split` along `dim`.

    The first ranks take one more token each where the length is not a multiple of the mesh's size.
    """
    group = group_of(mesh)
    return x.tensor_split(dist.get_world_size(group), dim)[dist.get_rank(group)]


def shard_lengths(length: int, mesh: Mesh, device: torch.device | str = "cpu", **same: int) -> tuple[int, ...]:
    """Tokens per rank, from each rank's own: one small all-gather, to be done once for all layers.

    Args:
        length: tokens on this rank.
        mesh: one-dimensional, or its process group.
        device: of the tensors that will travel. Where the group has no backend for a CPU (NCCL alone) the numbers
            travel on it, and reading them waits for it.
        same: numbers that must be equal on all ranks, such as batch=2.

    Raises:
        ValueError: on every rank, where the ranks differ in one of `same`.
    """
    rows = _gather([length, *same.values()], group_of(mesh), torch.device(device))
    for name, values in zip(same, zip(*(row[1:] for row in rows), strict=True), strict=False):
        if len(set(values)) > 1:
            raise ValueError(f"{name}: expected the same on every rank of the mesh, got {list(values)}")
    return tuple(row[0] for row in rows)


@dataclass(frozen=True, slots=True)
class Shard:
    """Which tokens of a sequence this rank holds: contiguous shards of these lengths, in the mesh's order."""

    mesh: Mesh
    lengths: tuple[int, ...]

    @property
    def first(self) -> int:
        """Position of this rank's first token."""
        return sum(self.lengths[: dist.get_rank(group_of(self.mesh))])


def agree(operands: Operands, needs_grad: bool, group: dist.ProcessGroup) -> tuple[int, ...]:
    """Tokens per rank, from one small all-gather of what each rank was called with.

    Raises:
        ValueError: on every rank, where the ranks differ in anything but tokens, or one of them refused its arguments.
    """
    q, k, v, ids = operands.q, operands.k, operands.v, operands.document_ids
    batch, heads, length, head_dim = q.shape
    sides = (-1 if side is None else side for side in (operands.window.left, operands.window.right))
    form = (0, 0) if ids is None else (ids.dim(), ID_DTYPES.index(ids.dtype))
    mine = [batch, heads, k.shape[1], head_dim, v.shape[3], DTYPES.index(q.dtype), *sides, *form, int(needs_grad)]
    rows = _gather([1, length, *mine], group, q.device)
    if refused := [rank for rank, row in enumerate(rows) if not row[0]]:
        raise ValueError(f"mesh: expected every rank to pass valid arguments; see the error on rank {refused[0]} of it")
    for (argument, what), values in zip(_FIELDS, zip(*(row[2:] for row in rows), strict=True), strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"{argument}: expected one {what} on every rank of the mesh, got {_names(argument, what, values)}"
            )
    return tuple(row[1] for row in rows)


def refuse(group: dist.ProcessGroup, device: torch.device) -> None:
    """Tell the other ranks, which are in `agree`, that this one refused its arguments."""
    _gather([0] * (len(_FIELDS) + 2), group, device)


def _names(argument: str, what: str, values: tuple[int, ...]) -> list[Any]:
    """Values in the words of the caller's arguments."""
    if what == "requires_grad":
        return [bool(value) for value in values]
    if what == "dtype":
        return [(ID_DTYPES if argument == "document_ids" else DTYPES)[value] for value in values]
    return [(None if value < 0 else value) if what.endswith("side") else value for value in values]


def _gather(mine: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
    """Gather every rank's numbers, in rank order."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    here = torch.tensor(mine, dtype=torch.int64, device="cpu" if on_cpu else device)
    every = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
    with lost("comparing arguments", set(range(len(every))), group):
        dist.all_gather(every, here, group=group)
    return [row.tolist() for row in every]


@contextlib.contextmanager
def lost(doing: str, peers: set[int], group: dist.ProcessGroup) -> Iterator[None]:
    """Turn the transport's error into one that says which rank was doing what with which others."""
    try:
        yield
    except RuntimeError as error:
        rank = dist.get_rank(group)
        others = ", ".join(str(peer) for peer in sorted(peers - {rank}))
        raise RuntimeError(
            f"context_parallel_swat: rank {rank} of its mesh lost the connection while {doing} with rank {others}: a "
            f"rank has died, or did not make the same call within the timeout ({error})"
        ) from error
