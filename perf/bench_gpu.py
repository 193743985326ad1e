"""The regression view on a GPU: `flex_swat`'s own choice beside a matrix product, synchronising in the timed call."""

import pytest
import torch

from perf.cases import GPU, PASSES
from perf.measure import bind
from perf.peers.ours import Swat

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CASES = {f"swat {case.name}": case for case in GPU}


def matmul():
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    return lambda: a @ b


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", ["matmul 8192³", *CASES])
def bench_gpu(benchmark, name, passes):
    benchmark.group = f"GPU, {passes}"
    case = CASES.get(name)
    run = bind(Swat("auto"), case, passes, case.tensors(torch.device("cuda")))[0] if case else matmul()

    def synchronised():  # pytest-benchmark reads the wall clock, which a launch does not wait for
        run()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=20, warmup_rounds=3)
