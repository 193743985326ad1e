"""`swat-flex info`: versions, devices, and which backend runs where."""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import get_args

import torch
from rich import box
from rich.table import Table

import swat_flex
from swat_flex import dispatch, winners
from swat_flex.cli import machine, screen
from swat_flex.problem import Backend, SwatProblem


def info() -> None:
    """Versions, devices, and which backend runs on each device and why."""
    console = screen.console()
    for name, version in _versions().items():
        console.print(f"{name:<12}{version}")
    store = winners.store()
    console.print(f"{'measured':<12}{len(list(store.entries()))} entries in {store.folder}", soft_wrap=True)
    for name in machine.devices():
        device = torch.device(name)
        console.print(f"\n{name}: {machine.describe(device)}", style="bold")
        console.print(_backends(device))
        console.print(f"auto: {_choice(device)}")


def _versions() -> dict[str, str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    return {
        "swat_flex": swat_flex.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
    }


def _backends(device: torch.device) -> Table:
    training = SwatProblem.of_self_attention(8, 1024, 64, torch.float32, device.type, 256)
    inference = replace(training, needs_grad=False)
    table = Table("backend", "works here", "why", box=box.SIMPLE)
    for name in get_args(Backend):
        if name == "auto":
            continue
        if reason := dispatch.why_not(inference, name):
            table.add_row(name, "no", reason)
        elif reason := dispatch.why_not(training, name):
            table.add_row(name, "forward only", reason)
        else:
            table.add_row(name, "yes", "supports float32 self-attention on this device")
    return table


def _choice(device: torch.device) -> str:
    problem = SwatProblem.of_self_attention(8, 1024, 64, torch.float32, device.type, 256)
    try:
        choice = dispatch.choose(problem)
    except NotImplementedError as error:
        return str(error)
    return f"{choice.backend}, {choice.why}"
