"""What each suite times, and the run of one suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from perf import cases
from perf.cases import Case
from perf.measure import Setting, run_races
from perf.peers import ATTENTION, DECODING, GPU_ATTENTION, GPU_DECODING, Peer
from perf.record import Race

SUITES = ("cpu", "gpu", "decode", "scaling")
# Who is scaled: FlexAttention compiles for every length, which takes a CPU longer than all of the measuring.
SCALED = {
    "cpu": ("swat cpp", "swat banded", "SDPA causal", "local-attention"),
    "cuda": ("swat flex", "swat triton", "SDPA causal", "FlexAttention softmax", "FlashAttention-2 window"),
}


@dataclass(frozen=True)
class Suite:
    """Cases, and who runs them."""

    name: str
    device: torch.device
    cases: tuple[Case, ...]
    peers: tuple[Peer, ...]


def suite(name: str, quick: bool) -> Suite:
    """A suite by name.

    Raises:
        ValueError: an unknown name, or the gpu suite without a CUDA device.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda and name != "cpu" else torch.device("cpu")
    match name:
        case "cpu":
            return Suite(name, device, cases.QUICK_CPU if quick else cases.CPU, ATTENTION)
        case "gpu":
            if not cuda:
                raise ValueError("suite: 'gpu' needs a CUDA device, and this machine has none")
            return Suite(name, device, cases.QUICK_GPU if quick else cases.GPU, GPU_ATTENTION)
        case "decode":
            found = cases.DECODE if cuda else cases.DECODE_CPU
            return Suite(name, device, found[:1] if quick else found, GPU_DECODING if cuda else DECODING)
        case "scaling":
            peers = tuple(peer for peer in ATTENTION if peer.name in SCALED[device.type])
            return Suite(name, device, cases.scaling(device.type, quick), peers)
    raise ValueError(f"suite: expected one of {', '.join(SUITES)}, got {name!r}")


def run_suite(chosen: Suite, quick: bool, advance: Callable[[str], object]) -> tuple[Race, ...]:
    """Hold every race of a suite, one after another."""
    setting = Setting.of(chosen.device, quick)
    if chosen.name == "scaling":
        setting = replace(setting, rounds=min(setting.rounds, 5))  # many cases, and a line through them
    contests = [(case, passes, chosen.peers) for case in chosen.cases for passes in case.passes]
    return tuple(race for contest in contests for race in run_races([contest], setting, advance))
