"""`swat-flex info`: versions, devices, and which backend runs where."""

from __future__ import annotations

import platform
from dataclasses import replace

import torch
from rich import box
from rich.table import Table

import swat_flex
from autotune import installed_versions
from swat_flex import dispatch, tuned
from swat_flex.cli import machine, screen
from swat_flex.decode import attend
from swat_flex.problem import Problem


def info() -> None:
    """Versions, devices, and which backend runs on each device and why."""
    console = screen.console()
    for name, version in _versions().items():
        console.print(f"{name:<12}{version}")
    store = tuned.store()
    console.print(f"{'measured':<12}{len(list(store.entries()))} entries in {store.place}", soft_wrap=True)
    for name in machine.devices():
        device = torch.device(name)
        console.print(f"\n{name}: {machine.describe(device)}", style="bold")
        console.print(_backends(device))
        console.print(f"auto: {_choice(device)}")
        console.print(f"swat_decode: {_decoding(device)}", soft_wrap=True)


def _versions() -> dict[str, str]:
    versions = installed_versions()
    return {
        "swat_flex": swat_flex.__version__,
        "python": platform.python_version(),
        "torch": versions.torch,
        "triton": versions.triton or "not installed",
        "cpp": dispatch.compiler(),
    }


def _training(device: torch.device) -> Problem:
    return Problem.of_self_attention(8, 1024, 64, torch.float32, device, 256)


def _backends(device: torch.device) -> Table:
    training = _training(device)
    inference = replace(training, needs_grad=False)
    table = Table("backend", "works here", "why", box=box.SIMPLE)
    for name, backend in dispatch.BACKENDS.items():
        if reason := backend.supports(inference):
            table.add_row(name, "no", reason)
        elif reason := backend.supports(training):
            table.add_row(name, "forward only", reason)
        else:
            table.add_row(name, "yes", "supports float32 self-attention on this device")
    return table


def _decoding(device: torch.device) -> str:
    step = replace(_training(device), q_len=1, kv_len=256, needs_grad=False)
    reasons = {name: backend.supports(step) for name, backend in attend.BACKENDS.items()}
    return "; ".join([attend.choose(step), *(f"{name}: {reason}" for name, reason in reasons.items() if reason)])


def _choice(device: torch.device) -> str:
    try:
        choice = dispatch.choose(_training(device))
    except NotImplementedError as error:
        return str(error)
    return f"{choice.backend}, {choice.why}"
