"""The regression view on a GPU: `flex_swat`'s own choice beside a matrix product, synchronising in the timed call."""

import pytest
import torch

from perf.cases import GPU, PASSES
from swat_flex import flex_swat

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def synchronised(run):
    """pytest-benchmark reads the wall clock, which a launch does not wait for."""

    def timed():
        run()
        torch.cuda.synchronize()

    return timed


def matmul():
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    return lambda: a @ b


def attention(case, passes):
    leaves = [x.requires_grad_(passes == "both") for x in case.tensors(torch.device("cuda"))]
    if passes == "forward":
        return lambda: flex_swat(*leaves, case.window)
    grad = torch.randn_like(leaves[0])
    return lambda: torch.autograd.grad(flex_swat(*leaves, case.window), leaves, grad)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("name", ["matmul 8192³", *(f"swat {case.name}" for case in GPU)])
def bench_gpu(benchmark, name, passes):
    benchmark.group = f"GPU, {passes}"
    cases = {f"swat {case.name}": case for case in GPU}
    run = attention(cases[name], passes) if name in cases else matmul()
    benchmark.pedantic(synchronised(run), rounds=20, warmup_rounds=3)
