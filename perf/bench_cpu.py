"""`cpp` on a CPU against what a PyTorch user would write instead: float32, B1 H8 L4096 D64, window 512.

`bench_ratios` times everybody in interleaved rounds of one run and holds `cpp` to its bars (`python -m perf bars` has
more of them); the others are the regression view of pytest-benchmark. Run with `make bench` on an idle machine: nothing
here belongs in CI.
"""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from rich.table import Table

from autotune import WallClock, time_together
from perf.cases import CPU, PASSES
from perf.measure import bind
from perf.peers.ours import Naive, Swat
from perf.peers.pytorch import FlexSoftmax, SdpaCausal

CASE, ROUNDS = CPU[0], 11
PEERS = {
    "cpp": Swat("cpp"),
    "banded": Swat("banded"),
    "FlexAttention softmax": FlexSoftmax(),
    "naive": Naive(),
    "SDPA causal": SdpaCausal(),
}
GROUPS = {"forward": "forward", "both": "forward and backward"}
# Bars: share of a matrix product's FLOP/s, and speed-ups over the others.
BARS = {
    "forward": (0.85, {"banded": 1.2, "FlexAttention softmax": 1.7, "naive": 30.0}),
    "both": (0.90, {"banded": 1.2, "naive": 20.0, "SDPA causal": 5.0}),
}


def matmul():
    a, b = torch.randn(2, 2048, 2048).unbind()
    return lambda: a @ b


def contender(name, passes, length=CASE.q_len):
    """A run of one contender; FlexAttention has no backward on a CPU."""
    if name.startswith("matmul"):
        return matmul()
    case, device = replace(CASE, q_len=length, kv_len=length), torch.device("cpu")
    return bind(PEERS[name], case, passes, case.tensors(device))[0]


def contenders(passes):
    return [
        "matmul 2048³",
        *(n for n, peer in PEERS.items() if peer.supports(CASE, torch.device("cpu"), passes) is None),
    ]


@pytest.mark.parametrize(("passes", "name"), [(passes, name) for passes in PASSES for name in contenders(passes)])
def bench_pass(benchmark, passes, name):
    benchmark.group = GROUPS[passes]
    rounds = 3 if name == "naive" else 15  # naive takes seconds, and nobody's regression hangs on it
    benchmark.pedantic(contender(name, passes), rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("passes", PASSES)
def bench_ratios(capsys, passes):
    share, speed_ups = BARS[passes]
    times = time_together({name: contender(name, passes) for name in contenders(passes)}, WallClock(), ROUNDS).timings
    ours = times["cpp"].median_ms
    flops, _ = PEERS["cpp"].definition(CASE).work(CASE, passes)
    of_matmul = (flops / ours) / (2 * 2048**3 / times["matmul 2048³"].median_ms)
    title = f"{GROUPS[passes]}: {of_matmul:.2f} of matmul's FLOP/s"
    table = Table("", "ms", "spread", "cpp is faster by", "bar", title=title)
    for name, t in times.items():
        bar = str(speed_ups.get(name, ""))
        table.add_row(name, f"{t.median_ms:.1f}", f"{t.spread:.0%}", f"{t.median_ms / ours:.2f}×", bar)
    show(capsys, table)
    assert of_matmul >= share
    for name, least in speed_ups.items():
        assert times[name].median_ms / ours >= least, name


@pytest.mark.parametrize("passes", PASSES)
def bench_growth(capsys, passes):
    """Eight times the tokens take at most nine times as long; nobody else in the race, whose memory would disturb."""
    runs = {length: contender("cpp", passes, length) for length in (4096, 32768)}
    times = time_together(runs, WallClock(), ROUNDS).timings
    table = Table("tokens", "ms", "spread", title=f"cpp, {GROUPS[passes]}")
    for length, t in times.items():
        table.add_row(str(length), f"{t.median_ms:.1f}", f"{t.spread:.0%}")
    show(capsys, table)
    assert times[32768].median_ms <= 9 * times[4096].median_ms


def show(capsys, table):
    with capsys.disabled():
        threads = torch.get_num_threads()
        Console().print(f"\n{CASE.sizes}, {threads} threads, torch {torch.__version__}", table)
