"""The steps of a GPU's report that are ours: each prints a JSON line for every result as soon as it has it."""

from __future__ import annotations

import csv
import json
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import Any

import torch

from perf import load
from perf.cases import GPU_REPORT, Passes, pretend
from perf.measure import Entrant, Setting, admit, run_races
from perf.peers import GPU_ATTENTION, GPU_DECODING, Peer
from perf.peers.ours import Swat, SwatDecode
from perf.record import Row, surroundings

KERNELS = "regex:(forward|query_gradient|key_gradients)_kernel"
NCU = f"ncu --clock-control none --kernel-name {KERNELS} --set detailed --csv".split()


def tell(**row: Any) -> None:
    """Print a result where the report reads it."""
    print(json.dumps(row), flush=True)


def place(dry: bool) -> torch.device:
    """Choose the device.

    Raises:
        RuntimeError: no CUDA device, and no dry run.
    """
    if not dry and not torch.cuda.is_available():
        raise RuntimeError("gpu-report needs a CUDA device, and this machine has none; --dry-run pretends one")
    return torch.device("cpu" if dry else "cuda:0")


def versions(dry: bool) -> None:
    """Tell device, versions, load, and which contender is there."""
    device = place(dry)
    found = load.look(device.type)
    about = surroundings(str(device))
    tell(surroundings={**about, "device": asdict(about["device"]), "load_before": asdict(found), "busy_ok": True})
    tell(python=platform.python_version(), cuda=torch.version.cuda, busy=found.busy)
    for peer in (*GPU_ATTENTION, *GPU_DECODING):
        tell(peer=peer.name, missing=peer.available(device))


def first(name: str, dry: bool) -> None:
    """Call one backend for the first time, forward and backward, and check it; seconds with the compilation."""
    device, case = place(dry), next(case for case in GPU_REPORT if case.decodes == (name == "decode"))
    case = pretend(case)  # compiled as the large ones are, and checked in no time
    if not dry:
        case = replace(case, dtype="bfloat16", head_dim=64)
    peer: Peer = SwatDecode() if name == "decode" else Swat("banded" if dry else name)  # type: ignore[arg-type]  # a name
    for passes in case.passes:
        found = admit(peer, case, passes, case.tensors(device), device)
        tell(case=asdict(case), passes=passes, **_result(found))


def race(name: str, passes: Passes, seconds: float, dry: bool) -> None:
    """Race the contenders of a case; every admission and every sample is told before the race's own result."""
    device = place(dry)
    case = next(case for case in GPU_REPORT if case.name == name)
    case = pretend(case) if dry else case
    setting = Setting(device, 2, sizes=(64, 2**16)) if dry else Setting.of(device, quick=False)
    peers = GPU_DECODING if case.decodes else GPU_ATTENTION
    (found,) = run_races(
        [(case, passes, peers)], setting,
        told=lambda peer, what: tell(case=case.name, passes=passes, peer=peer, **_result(what)),
        until=time.monotonic() + 0.8 * seconds,
    )  # fmt: skip
    tell(race=asdict(found))


def _result(found: Entrant | Row | float) -> dict[str, Any]:
    """A sample in ms, or how a contender was admitted."""
    if isinstance(found, float):
        return {"ms": found}
    if isinstance(found, Entrant):
        checked = found.checked
        return {"status": "right", "errors": checked.errors, "use": checked.use, "first_call_s": found.first_call}
    return {"status": found.status, "reason": found.reason, "errors": found.errors}


CALL = """
import torch
from swat_flex import flex_swat
q, k, v = (torch.randn(2, 16, 4096, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in "qkv")
flex_swat(q, k, v, 1024, backend="triton").sum().backward()
torch.cuda.synchronize()
"""


def ncu(dry: bool) -> None:
    """Read the hardware counters of the three kernels of a training step, where Nsight Compute is installed."""
    place(dry)
    if dry or shutil.which("ncu") is None:
        tell(missing="ncu is not installed")
        return
    done = subprocess.run([*NCU, sys.executable, "-c", CALL], capture_output=True, text=True, check=False)
    table = [line for line in done.stdout.splitlines() if line.startswith('"')]
    for line in csv.DictReader(table):
        metric, value = line.get("Metric Name"), line.get("Metric Value")
        if metric and value:
            tell(kernel=line.get("Kernel Name"), metric=metric, unit=line.get("Metric Unit"), value=value)
    if done.returncode or not table:
        tell(missing=f"ncu ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
