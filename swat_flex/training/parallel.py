"""Several processes under torchrun: who they are, and FSDP2."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swat_flex.nn import SwatTransformer


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among its equals.

    mesh has a dimension "data", over which rows are shared out and parameters sharded; None is a process alone.
    """

    device: torch.device
    mesh: DeviceMesh | None = None

    @property
    def size(self) -> int:
        """Processes that draw different rows."""
        return 1 if self.mesh is None else self.mesh["data"].size()

    @property
    def rank(self) -> int:
        """Which share of the rows is this process's."""
        return 0 if self.mesh is None else self.mesh["data"].get_local_rank()

    @property
    def first(self) -> bool:
        """Whether this process prints and saves."""
        return self.mesh is None or torch.distributed.get_rank() == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over the ranks, in place."""
        if self.mesh is not None:
            torch.distributed.all_reduce(values, group=self.mesh["data"].get_group())
        return values

    def agree(self, *values: float) -> list[float]:
        """The first process's values, everywhere: clocks and wishes that would else lead apart."""
        if self.mesh is None:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)  # on the CPU, so that no GPU waits for it
        torch.distributed.broadcast(told, 0)
        return list(told.tolist())


def start(device: torch.device) -> Ranks:
    """Join the processes that torchrun started; alone without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend)
    size = torch.distributed.get_world_size()
    return Ranks(device, init_device_mesh(device.type, (size,), mesh_dim_names=("data",)))


def shard(model: SwatTransformer, ranks: Ranks) -> None:
    """FSDP2: every block's parameters are gathered when it runs. They stay float32; autocast makes them bfloat16."""
    if ranks.mesh is None:
        return
    from torch.distributed.fsdp import fully_shard  # seconds of import that a process alone does not need

    modules: list[nn.Module] = [*model.blocks, model]
    for module in modules:
        fully_shard(module, mesh=ranks.mesh["data"])


def stop(ranks: Ranks) -> None:
    """Leave the other processes in peace."""
    if ranks.mesh is not None:
        torch.distributed.destroy_process_group()
