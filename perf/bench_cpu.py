"""`cpp` on a CPU against what a PyTorch user would write instead: float32, B1 H8 L4096 D64, window 512.

`bench_ratios` times everybody in interleaved rounds of one run and holds `cpp` to its bars (`python -m perf bars` has
more of them); the others are the regression view of pytest-benchmark. Run with `make bench` on an idle machine: nothing
here belongs in CI.
"""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from perf.cases import CPU, PASSES, WORDS
from perf.measure import MATMUL, Setting, bind, run_races
from perf.peers.ours import Naive, Swat
from perf.peers.pytorch import FlexSoftmax, SdpaCausal
from perf.report import table

CASE, SETTING = CPU[0], Setting(torch.device("cpu"), rounds=11)
LONG = replace(CASE, name="long", q_len=32768, kv_len=32768)
PEERS = {
    "cpp": Swat("cpp"),
    "banded": Swat("banded"),
    "FlexAttention softmax": FlexSoftmax(),
    "naive": Naive(),
    "SDPA causal": SdpaCausal(),
}
# Bars: share of a matrix product's FLOP/s, and speed-ups over the others.
BARS = {
    "forward": (0.85, {"swat banded": 1.2, "FlexAttention softmax": 1.7, "naive": 30.0}),
    "both": (0.90, {"swat banded": 1.2, "naive": 20.0, "SDPA causal": 5.0}),
}


def matmul():
    a, b = torch.randn(2, 2048, 2048).unbind()
    return lambda: a @ b


def contenders(passes):
    """FlexAttention has no backward on a CPU."""
    return [n for n, peer in PEERS.items() if peer.supports(CASE, SETTING.device, passes) is None]


@pytest.mark.parametrize(
    ("passes", "name"), [(passes, name) for passes in PASSES for name in ("matmul 2048³", *contenders(passes))]
)
def bench_pass(benchmark, passes, name):
    benchmark.group = WORDS[passes]
    run = bind(PEERS[name], CASE, passes, CASE.tensors(SETTING.device))[0] if name in PEERS else matmul()
    rounds = 3 if name == "naive" else 15  # naive takes seconds, and nobody's regression hangs on it
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=2)


def race(capsys, *contests):
    races = run_races(contests, SETTING)
    with capsys.disabled():
        Console(width=140).print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}", *map(table, races))
    return races


@pytest.mark.parametrize("passes", PASSES)
def bench_ratios(capsys, passes):
    share, speed_ups = BARS[passes]
    (found,) = race(capsys, (CASE, passes, tuple(PEERS.values())))
    ours = found.row("swat cpp")
    assert ours.flops_per_second / found.ceilings[MATMUL].per_second >= share
    for name, least in speed_ups.items():
        assert found.row(name).ms / ours.ms >= least, name


@pytest.mark.parametrize("passes", PASSES)
def bench_growth(capsys, passes):
    """Eight times the tokens take at most nine times as long; nobody else in the race, whose memory would disturb."""
    short, long = race(capsys, *((case, passes, (PEERS["cpp"],)) for case in (CASE, LONG)))
    assert long.row("swat cpp").ms <= 9 * short.row("swat cpp").ms
