"""What one rank does in the tests of calls and errors; each returns what the test checks, or raises."""

import os
import time
from functools import partial

import torch
import torch.distributed as dist
from cases import swat_case
from ranks import text_of, traffic
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from swat_flex import flex_swat
from swat_flex.distributed import attend, context_parallel_swat, exchange, local_shard, shard_lengths

CASE = swat_case(60, 9, 2, 16, dtype="float64", logit_bias="tensor")
swat = partial(context_parallel_swat, window=9)


def inputs(rank):
    """A rank's q, k, v of CASE, differentiable."""
    ranks = dist.get_world_size()
    return [x.tensor_split(ranks, 2)[rank].clone().requires_grad_() for x in CASE.tensors()]


def gradients(out, leaves, **options):
    return torch.autograd.grad(out.sin().sum(), leaves, **options)


def twice(rank):
    """Two runs, and two backward passes of one."""
    q, k, v = leaves = inputs(rank)
    runs = []
    for _ in range(2):
        out = swat(q, k, v, mesh=dist.group.WORLD)
        runs += [(out, *gradients(out, leaves, retain_graph=True)) for _ in range(2)]
    return [[x.detach() for x in run] for run in runs]


def ways(rank):
    """One call in every way that must not change it: name to (out, dq, dk, dv)."""
    q, k, v = leaves = inputs(rank)
    ranks, world = dist.get_world_size(), dist.group.WORLD
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "context"))
    calls = {
        "group": lambda: swat(q, k, v, mesh=world),
        "mesh": lambda: swat(q, k, v, mesh=mesh["context"]),
        "lengths": lambda: swat(q, k, v, mesh=world, lengths=shard_lengths(q.shape[2], world)),
        "checkpoint": lambda: checkpoint(partial(swat, mesh=world), q, k, v, use_reentrant=False),
    }
    found = {}
    for name, call in calls.items():
        out = call()
        found[name] = [x.detach() for x in (out, *gradients(out, leaves))]
    with torch.no_grad():
        found["no_grad"] = [swat(q, k, v, mesh=world)]
    with torch.inference_mode():
        found["inference"] = [swat(q, k, v, mesh=world).clone()]
    return found


def partial_gradients(rank):
    """Gradients where not all of q, k, v want one: {which want: gradients}."""
    found = {}
    for wanted in ("q", "k", "v", "kv"):
        given = dict(zip("qkv", inputs(rank), strict=True))
        q, k, v = (x if name in wanted else x.detach() for name, x in given.items())
        out = swat(q, k, v, mesh=dist.group.WORLD)
        found[wanted] = gradients(out, [given[name] for name in wanted])
    return found


def one_process():
    """out, dq, dk, dv of CASE in one process."""
    leaves = [x.requires_grad_() for x in CASE.tensors()]
    out = flex_swat(*leaves, 9)
    return [x.detach() for x in (out, *gradients(out, leaves))]


def order(rank):
    """What happens when: messages posted, waited for, rows computed forward and backward."""
    events = []
    posted, call = exchange._Posted, attend.flex_swat

    class Watched(posted):
        def __init__(self, *arguments):
            events.append("post")
            super().__init__(*arguments)

        def wait(self):
            events.append("wait")
            return super().wait()

    class Rows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            events.append("rows")
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            events.append("rows")
            return grad

    exchange._Posted, attend.flex_swat = Watched, lambda *x, **options: Rows.apply(call(*x, **options))
    try:
        leaves = inputs(rank)
        out = swat(*leaves, mesh=dist.group.WORLD)
        forward = list(events)
        events.clear()
        gradients(out, leaves)
        return forward, events
    finally:
        exchange._Posted, attend.flex_swat = posted, call


def layout(rank):
    """Strides of an output whose inputs lie `[B, L, H, D]` in memory."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(rank))
    return swat(q, k, v, mesh=dist.group.WORLD).stride(), torch.empty_like(q).stride()


def autocast(rank):
    """Output's dtype and the bytes received where float32 inputs meet bfloat16 autocast."""
    q, k, v = (x.detach().float() for x in inputs(rank))
    with torch.autocast("cpu", dtype=torch.bfloat16), traffic() as batches:
        out = swat(q, k, v, mesh=dist.group.WORLD)
    return out.dtype, batches[0][0]


def shards(rank):
    """`local_shard` of 0…10, and everyone's length."""
    part = local_shard(torch.arange(11), dist.group.WORLD, 0)
    return part.tolist(), shard_lengths(len(part), dist.group.WORLD)


def mistakes(rank):
    """Name of a mistake on the last rank alone to the text of this rank's error."""
    last = rank == dist.get_world_size() - 1
    q, k, v = inputs(rank)
    ids = torch.zeros(q.shape[2], dtype=torch.int64)
    world = dist.group.WORLD
    calls = {
        "batch": lambda: swat(*((x.repeat(2, 1, 1, 1) for x in (q, k, v)) if last else (q, k, v)), mesh=world),
        "key heads": lambda: swat(q, k[:, : 1 + (not last)], v[:, : 1 + (not last)], mesh=world),
        "head dimension": lambda: swat(q[..., : 15 + (not last)], k[..., : 15 + (not last)], v, mesh=world),
        "value dimension": lambda: swat(q, k, v[..., : 15 + (not last)], mesh=world),
        "dtype": lambda: swat(*((x.float() for x in (q, k, v)) if last else (q, k, v)), mesh=world),
        "window": lambda: context_parallel_swat(q, k, v, (8, None) if last else 9, mesh=world),
        "ids": lambda: swat(q, k, v, mesh=world, document_ids=ids if last else None),
        "ids' dtype": lambda: swat(q, k, v, mesh=world, document_ids=ids.int() if last else ids),
        "requires_grad": lambda: swat(q, k.detach() if last else k, v.detach() if last else v, mesh=world),
        "refused": lambda: swat(q, k.float() if last else k, v, mesh=world),
        "kind": lambda: swat(None if last else q, k, v, mesh=world),
        "backend": lambda: swat(q, k, v, mesh=world, backend="flex" if last else "auto"),
        "fewer queries": lambda: swat(q[:, :, : 5 if last else None], k, v, mesh=world),
    }
    found = {name: text_of(call) for name, call in calls.items()}
    assert swat(q, k, v, mesh=world).shape == q.shape  # and the group goes on
    return found


def wrong_meshes(rank):
    """Errors that need no other rank."""
    q, k, v = inputs(rank)
    ranks, world = dist.get_world_size(), dist.group.WORLD
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("data", "context"))
    lengths = shard_lengths(q.shape[2], world)
    return [
        text_of(lambda: swat(q, k, v, mesh=mesh)),
        text_of(lambda: swat(q, k, v, mesh="context")),
        text_of(lambda: swat(q, k, v, mesh=world, lengths=lengths[1:])),
        text_of(lambda: swat(q, k, v, mesh=world, lengths=[n + 1 for n in lengths])),
    ]


def bereaved(rank, when):
    """Seconds until a rank hears that rank 1 died before a call, during its exchange or before its backward pass."""
    q, k, v = leaves = inputs(rank)
    world = dist.group.WORLD
    lengths = None if when == "call" else shard_lengths(q.shape[2], world)
    if rank == 1 and when != "backward":
        os._exit(1)
    start = time.monotonic()
    try:
        out = context_parallel_swat(q, k, v, None, mesh=world, lengths=lengths)
        if rank == 1:
            os._exit(1)
        start = time.monotonic()
        gradients(out, leaves)
    except RuntimeError as error:
        return time.monotonic() - start, str(error)
    return None
