"""One sequence over two processes, which this script starts itself: only the window's edge travels between them.

It checks itself: each process compares its rows and gradients with `naive_swat` over the whole sequence.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from swat_flex import naive_swat
from swat_flex.distributed import context_parallel_swat, local_shard

RANKS, LENGTH, WINDOW = 2, 301, 48  # processes; tokens, which two processes share unevenly; keys per query


def whole() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw q, k, v and the output's gradient of the whole sequence, the same in every process."""
    draw = torch.Generator().manual_seed(0)
    q, grad = torch.randn(2, 1, 4, LENGTH, 32, generator=draw).unbind()
    k, v = torch.randn(2, 1, 2, LENGTH, 32, generator=draw).unbind()
    return q, k, v, grad


def run(rank: int, folder: str) -> None:
    """Attend as one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    assert group is not None
    *inputs, grad = whole()

    own = [local_shard(x, group, 2).clone().requires_grad_() for x in inputs]
    out = context_parallel_swat(*own, WINDOW, mesh=group)
    results = (out, *torch.autograd.grad(out, own, local_shard(grad, group, 2)))

    exact = [x.double().requires_grad_() for x in inputs]
    expected = naive_swat(*exact, WINDOW)
    expected = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    errors = [(x - local_shard(y, group, 2)).abs().max().item() for x, y in zip(results, expected, strict=True)]
    assert max(errors) < 1e-4, errors

    halo = min(WINDOW - 1, LENGTH - out.shape[2]) if rank else 0
    for turn in range(RANKS):
        dist.barrier()
        if turn == rank:
            text = f"rank {rank}: {out.shape[2]} of {LENGTH} tokens, {halo} keys received; largest difference from one"
            print(f"{text} process: out {errors[0]:.1e}, gradients {max(errors[1:]):.1e}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (folder,), nprocs=RANKS)


if __name__ == "__main__":
    main()
