"""One sequence over many devices: context parallelism that moves only the window's edge.

Rank r of a mesh holds a contiguous shard of the sequence. Its first queries see keys of the ranks before it: the halo,
at most window − 1 keys, whatever the length and the number of ranks. The halo travels while the rows that need none are
computed; in the backward pass its gradients travel back while the gradients of those rows are computed.

    shard = functools.partial(local_shard, mesh=mesh, dim=2)
    out = context_parallel_swat(shard(q), shard(k), shard(v), window=4096, mesh=mesh)  # this rank's rows

A rank receives min(window − 1, keys to the left) rows of B·Hkv·(D + Dv)·itemsize bytes per layer, document ids beside
them, and the same again for the gradients; with window None every key to the left travels. docs/distributed.md compares
that with an all-gather and with ring attention.

Decoding needs none of this: a `RingCache` is one window per layer, whatever came before, and it fits on one device.
"""

from swat_flex.distributed.agreement import Shard, local_shard, shard_lengths
from swat_flex.distributed.attend import context_parallel_swat

__all__ = ["Shard", "context_parallel_swat", "local_shard", "shard_lengths"]
