"""Several processes under torchrun: who they are, and FSDP2."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from swat_flex.nn import SwatTransformer
from swat_flex.training.data import Batch


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of several processes this one is.

    Attributes:
        device: of this process.
        mesh: dimensions "data", over which rows are shared out, and "context", over which the tokens of each row are;
            None for a process alone.
        everyone: the same processes in one dimension, over which parameters are sharded.
    """

    device: torch.device
    mesh: DeviceMesh | None = None
    everyone: DeviceMesh | None = None

    @property
    def size(self) -> int:
        """Groups of processes that draw different rows."""
        return 1 if self.mesh is None else self.mesh["data"].size()

    @property
    def context(self) -> int:
        """Processes that share the tokens of a row."""
        return 1 if self.mesh is None else self.mesh["context"].size()

    @property
    def rank(self) -> int:
        """Which share of the rows is this process's."""
        return 0 if self.mesh is None else self.mesh["data"].get_local_rank()

    @property
    def first(self) -> bool:
        """Tell whether this process prints and saves."""
        return self.mesh is None or torch.distributed.get_rank() == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place. Processes that share a row each count the whole row."""
        if self.mesh is not None:
            torch.distributed.all_reduce(values)
        return values

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean over all processes, in place."""
        return self.sum(value).div_(self.size * self.context)

    def part(self, batch: Batch) -> Batch:
        """This process's tokens of its rows, on its device."""
        if self.mesh is not None and self.context > 1:
            from swat_flex.distributed import local_shard  # seconds of import

            mesh = self.mesh["context"]
            batch = Batch(*(local_shard(x, mesh, 1).contiguous() for x in batch))
        return batch.to(self.device)

    def agree(self, *values: float) -> list[float]:
        """Broadcast the first process's values, so that all processes stop at the same step.

        Each has a clock of its own and gets its own signals.
        """
        if self.mesh is None:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)  # on the CPU, so that no GPU waits for it
        torch.distributed.broadcast(told, 0)
        return list(told.tolist())


def start(device: torch.device, context: int = 1) -> Ranks:
    """Join the processes that torchrun started; alone without it.

    Args:
        device: of each process; of CUDA devices each takes its own.
        context: processes that share the tokens of a row.

    Raises:
        ValueError: context that does not divide the number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if context < 1 or size % context:
        raise ValueError(f"context_parallel: expected a divisor of the {size} processes (of torchrun), got {context}")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend)
    return meshed(device, size, context)


def meshed(device: torch.device, size: int, context: int = 1) -> Ranks:
    """Arrange the `size` processes of an initialised group: runs of `context` neighbours share the tokens of a row."""
    mesh = init_device_mesh(device.type, (size // context, context), mesh_dim_names=("data", "context"))
    return Ranks(device, mesh, init_device_mesh(device.type, (size,), mesh_dim_names=("everyone",)))


def shard(model: SwatTransformer, ranks: Ranks) -> None:
    """Shard the parameters over all processes with FSDP2, which gathers those of a block when it runs.

    Processes that share rows take part too: a gradient is the mean over the tokens of all processes, and no parameter
    is held twice. Parameters stay float32; autocast makes them bfloat16.
    """
    if ranks.mesh is None or ranks.everyone is None:
        return
    if ranks.context > 1:
        model.context = ranks.mesh["context"]
    from torch.distributed.fsdp import fully_shard  # seconds of import that a process alone does not need

    modules: list[nn.Module] = [*model.blocks, model]
    for module in modules:
        fully_shard(module, mesh=ranks.everyone)


def stop(ranks: Ranks) -> None:
    """Leave the process group, where there is one."""
    if ranks.mesh is not None:
        torch.distributed.destroy_process_group()
