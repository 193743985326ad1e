"""Lower a caller's own compiled function for a pretend GPU, at 50 lengths: `python trace.py SCRATCH`.

Prints {"graphs": how many the caller's torch.compile made} as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pretend_cuda

pretend_cuda.load_stubs(Path(sys.argv[1]))

import contextlib  # noqa: E402  (the rest needs the pretend GPU)
import types  # noqa: E402

import torch  # noqa: E402
import torch._inductor.config  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from swat_flex import flex_swat  # noqa: E402

torch._inductor.config.force_disable_caches = True


class Lowered(Exception):
    """Raised instead of running what was lowered."""


def only_lower(graph: GraphLowering) -> types.SimpleNamespace:
    graph.codegen()

    def call(args: list[Tensor]) -> None:
        raise Lowered

    return types.SimpleNamespace(call=call, __file__="/dev/null", key="key", runner=None)


@torch.compile(fullgraph=True)
def attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, ids: Tensor) -> Tensor:
    return flex_swat(q, k, v, 300, slopes=slopes, document_ids=ids, backend="flex")


if __name__ == "__main__":
    pretend_cuda.install(90)
    GraphLowering.compile_to_module = only_lower
    with FakeTensorMode():
        slopes = torch.zeros(4, device="cuda", requires_grad=True)
        for length in (*range(40, 3040, 75), *range(128, 1408, 128)):
            q = torch.randn(2, 4, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            k, v = torch.randn(2, 2, 2, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True).unbind()
            with contextlib.suppress(Lowered):
                attention(q, k, v, slopes, torch.zeros(length, device="cuda", dtype=torch.int64))
    print(json.dumps({"graphs": counters["stats"]["unique_graphs"]}))
