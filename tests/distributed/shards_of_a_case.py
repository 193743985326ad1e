"""A case of `flex_swat` cut into shards: what one rank computes, and the whole put together again."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from ranks import text_of, traffic

from swat_flex.distributed import context_parallel_swat
from swat_flex.testing.budget import with_gradients
from swat_flex.testing.case import SwatCase


@dataclass(frozen=True)
class Sharded:
    """A case and the tokens of each rank. `ids`: documents that shards' borders cut, or those of the case."""

    case: SwatCase
    lengths: tuple[int, ...]
    backend: str = "auto"
    known: bool = False  # whether the ranks are told each other's lengths

    def local(self, rank):
        """(q, k, v), the output's gradient and the options of one rank."""
        own = partial(torch.Tensor.narrow, start=sum(self.lengths[:rank]), length=self.lengths[rank])
        options = dict(self.case.options())
        if options["document_ids"] is not None:
            options["document_ids"] = own(options["document_ids"], -1)
        if self.known:
            options["lengths"] = self.lengths
        inputs = tuple(own(x, 2) for x in self.case.tensors())
        return inputs, own(self.case.gradient(), 2), options

    def run(self, rank):
        """What `with_gradients` gives on one rank, and the traffic it took."""
        inputs, grad, options = self.local(rank)
        swat = partial(context_parallel_swat, mesh=dist.group.WORLD, backend=self.backend)
        with traffic() as batches:
            results = with_gradients(swat, inputs, self.case.window, grad, **options)
        return results, batches

    def expected_halo(self, rank):
        """Keys of other ranks that one rank's queries see."""
        before, own = sum(self.lengths[:rank]), self.lengths[rank]
        after = sum(self.lengths) - before - own
        window = self.case.window
        if not isinstance(window, tuple):
            window = (None if window is None else window - 1, 0)
        left, right = (
            far if side is None else min(side, far) for side, far in zip(window, (before, after), strict=True)
        )
        return (left + right) * (own > 0)


def run_all(rank, cases):
    """Every case on one rank: (results, traffic), or the text of its error."""
    return [text_of(case.run, rank) for case in cases]


def whole(parts):
    """Results of all ranks as one process has them: rows one after the other, per-head gradients summed."""
    joined = {name: torch.cat([part[name] for part in parts], 2) for name in ("out", "dq", "dk", "dv")}
    summed = {name: sum(part[name] for part in parts) for name in parts[0] if name not in joined}
    return joined | summed
