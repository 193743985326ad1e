"""Decoding on a CUDA device: against the reference, in a CUDA graph, compiled, to the bit, tuned."""

import dataclasses

import pytest
import torch
from within import assert_within

from swat_flex import RingCache, swat_decode, swat_prefill
from swat_flex.backends.triton import decode_op
from swat_flex.problem import Problem
from swat_flex.testing.budget import exact_swat, rough_swat

pytestmark = pytest.mark.gpu


def inputs(length, dtype, batch=2, heads=2, group=4, head_dim=64, value_dim=64):
    q = torch.randn(batch, heads * group, length, head_dim).to(dtype)
    k = torch.randn(batch, heads, length, head_dim).to(dtype)
    return q, k, torch.randn(batch, heads, length, value_dim).to(dtype)


def step(q, k, v, cache, backend="triton"):
    cache.append(k, v)
    return swat_decode(q, cache, backend=backend)


@pytest.mark.parametrize("backend", ["banded", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [1, 4, 16])
@pytest.mark.parametrize(
    ("window", "group", "head_dim", "value_dim"),
    [(100, 1, 64, 64), (1024, 4, 128, 128), (333, 8, 40, 24), (2000, 1, 256, 256)],
)
def test_prompt_and_steps_are_the_full_forward(window, group, head_dim, value_dim, queries, dtype, backend):
    length = window + 5 * queries
    q, k, v = inputs(length, dtype, group=group, head_dim=head_dim, value_dim=value_dim)
    cache = RingCache(2, 2, window, head_dim, value_dim, dtype, "cuda", queries=queries)
    on_gpu = [x.cuda() for x in (q, k, v)]
    prompt = length - 3 * queries
    swat_prefill(*(x[:, :, :prompt] for x in on_gpu), cache, backend="banded")
    rows = [
        step(*(x[:, :, first : first + queries] for x in on_gpu), cache, backend)
        for first in range(prompt, length, queries)
    ]
    new = q[:, :, prompt:]
    exact, rough = (f(new, k, v, window) for f in (exact_swat, rough_swat))
    assert_within(torch.cat(rows, 2).cpu(), exact=exact, rough=rough, window=window)


def test_auto_is_triton():
    q, k, v = (x.cuda() for x in inputs(100, torch.bfloat16))
    cache = RingCache(2, 2, 64, 64, dtype=torch.bfloat16, device="cuda")
    cache.append(k, v)
    new = q[:, :, -1:]
    assert torch.equal(swat_decode(new, cache), swat_decode(new, cache, backend="triton"))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_mixed_lengths_repeat_to_the_bit_and_read_live_slots_alone(batch):
    q, k, v = (x.cuda() for x in inputs(700, torch.bfloat16, batch=batch))
    caches = [RingCache(batch, 2, 512, 64, dtype=torch.bfloat16, device="cuda", queries=4) for _ in range(2)]
    caches[1].append(torch.full_like(k, float("nan")), torch.full_like(v, float("nan")))
    caches[1].reset()
    kept = torch.arange(700, device="cuda") < torch.randint(0, 701, (batch, 1), device="cuda")
    for cache in caches:
        cache.append(k, v, kept)
    first, second = (swat_decode(q[:, :, :3], cache, backend="triton") for cache in caches)
    assert torch.equal(first, second)
    assert first.isfinite().all()


def captured(call):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def test_a_step_replays_as_a_cuda_graph():
    """Positions are tensors: the graph captured once goes on past the window."""
    q, k, v = (x.cuda() for x in inputs(200, torch.bfloat16))
    cache, plain = (RingCache(2, 2, 64, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    new = [x[:, :, :1].clone() for x in (q, k, v)]
    graph, out = captured(lambda: step(*new, cache))
    cache.reset()
    for t in range(200):
        for static, x in zip(new, (q, k, v), strict=True):
            static.copy_(x[:, :, t : t + 1])
        graph.replay()
        assert torch.equal(out, step(*(x[:, :, t : t + 1] for x in (q, k, v)), plain)), t
    assert cache.length.tolist() == [200, 200]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_is_one_graph(mode):
    torch._dynamo.reset()
    q, k, v = (x.cuda() for x in inputs(200, torch.bfloat16))
    cache, plain = (RingCache(2, 2, 64, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    compiled = torch.compile(step, fullgraph=True, mode=mode)
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(200):
            new = [x[:, :, t : t + 1].clone() for x in (q, k, v)]
            assert torch.equal(compiled(*new, cache).clone(), step(*new, plain)), t


def test_nothing_waits_for_the_device():
    q, k, v = (x.cuda() for x in inputs(100, torch.bfloat16))
    cache = RingCache(2, 2, 64, 64, dtype=torch.bfloat16, device="cuda")
    mask = torch.rand(2, 100, device="cuda") < 0.5
    new = [x[:, :, :1] for x in (q, k, v)]

    def everything():
        swat_prefill(q, k, v, cache, mask=mask, backend="banded")
        cache.append(k, v, mask)
        for backend in ("triton", "banded"):
            step(*new, cache, backend)
        cache.reorder(index)
        cache.reset(rows)

    index, rows = torch.tensor([1, 0], device="cuda"), torch.tensor([True, False], device="cuda")
    everything()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_tuned_step_runs_its_winner(monkeypatch):
    from swat_flex.tuning.plan import jobs_of, plan
    from swat_flex.tuning.search import run_searches

    of = Problem.of_self_attention(8, 256, 64, torch.bfloat16, "cuda", 256)
    jobs = jobs_of(dataclasses.replace(of, kv_heads=2, q_len=1, needs_grad=False), "auto", 15, decode=True)
    (outcome,) = run_searches(plan(jobs, 15), 15, lambda *_: None, lambda _: None).outcomes
    assert outcome.saved
    launch, launched = decode_op._launch, []
    monkeypatch.setattr(decode_op, "_launch", lambda config, *rest: launched.append(config) or launch(config, *rest))
    cache = RingCache(1, 2, 256, 64, dtype=torch.bfloat16, device="cuda:0")
    step(*(x.cuda() for x in inputs(1, torch.bfloat16, batch=1)), cache)
    assert launched == [outcome.result.winner]
