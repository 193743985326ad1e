"""Records, peers and machines that measure nothing."""

from dataclasses import replace

import torch

from autotune import Device
from perf.cases import PASSES, layer, scaling
from perf.peers import Peer
from perf.peers.ours import Swat
from perf.record import Ceiling, Race, Record, Row
from swat_flex import flex_swat

CPU = torch.device("cpu")
TINY = layer("tiny", "small enough for a test", (4, 2), 150, 48)


class WindowTooWide(Swat):
    """Sees one key more than it says."""

    def __init__(self):
        super().__init__("banded")
        self.name = "one key too many"

    def prepare(self, case, q, k, v):
        return lambda: flex_swat(q, k, v, case.window + 1)


class WrongGradient(Swat):
    """Its output is right, dv is not."""

    def __init__(self):
        super().__init__("banded")
        self.name = "half of dv"

    def prepare(self, case, q, k, v):
        return lambda: flex_swat(q, k, (v + v.detach()) / 2, case.window)


class Broken(Peer):
    """Raises what a third party's kernel might."""

    name = "broken"

    def definition(self, case):
        return Swat("banded").definition(case)

    def prepare(self, case, q, k, v):
        raise RuntimeError("no kernel image\nis available")


def row(peer, ms, flops=1e9, **more):
    base = Row(
        peer,
        "sigmoid, window 512, balanced slopes",
        peer.startswith("swat"),
        "timed",
        median_ms=ms,
        spread=0.02,
        rounds=9,
        flops=flops,
        bytes=2**24,  # scaling_record has the true ones
        peak_bytes=int(2**20 * ms),
        errors={"out": 1e-6},
        use=0.7,
        allowed=1.0,
    )
    return replace(base, **more)


def race(case, passes, rows, chosen="swat banded"):
    ceilings = {
        "matmul": Ceiling("torch.matmul 2,048³ float32", 2e11, 86.0, 0.02),
        "copy": Ceiling("copy of 256 MiB, read and written", 2e10, 27.0, 0.02),
    }
    return Race(case, passes, "wall", chosen, 0.01, ceilings, tuple(rows))


def record(suite="cpu", races=None, **more):
    if races is None:
        skipped = Row("fla window", "softmax, window 48", False, "skipped", "not installed")
        races = [race(TINY, p, [row("swat banded", 3.0), row("SDPA causal", 9.5, ours=False), skipped]) for p in PASSES]
    versions = {"swat_flex": "0.1.0", "torch": "2.13.0+cpu", "triton": None, "cuda": None, "python": "3.11.9"}
    base = Record(
        suite=suite,
        quick=False,
        created="2030-01-02T03:04:05Z",
        commit="0123456789",
        device=Device("cpu", "Some CPU 9000", "AVX512", 2),
        versions=versions,
        threads=2,
        load_before={"cores": 0.01, "gpu_percent": None},
        busy_ok=False,
        races=tuple(races),
    )
    return replace(base, **more)


def scaling_record():
    """Times in proportion to useful work, causal attention's quadratic."""
    races = []
    for case in scaling("cpu", quick=False):
        for passes in PASSES:
            flops, moved = Swat("banded").definition(case).work(case, passes)
            rows = [row("swat banded", flops / 1e8, flops, bytes=moved)]
            if case.q_len <= 8192:
                causal = 2.0 * case.q_heads * case.q_len**2 * 64 * (3.5 if passes == "both" else 1)
                rows.append(
                    row("SDPA causal", causal / 2e8, causal, definition="softmax, causal", ours=False, bytes=moved)
                )
                if passes == "forward":
                    rows.append(row("FlexAttention softmax", flops / 9e7, flops, ours=False, bytes=moved))
            races.append(race(case, passes, rows))
    return record("scaling", races)
