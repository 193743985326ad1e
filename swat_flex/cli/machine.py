"""This machine: its devices, their names and their memory. Nothing here fails on what is absent."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def devices() -> list[str]:
    """Every device that tensors can live on: "cpu", then "cuda:0", "mps:0" and so on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]


def describe(device: torch.device) -> str:
    """One line: model, and threads of a CPU, compute capability and memory of a CUDA device."""
    if device.type == "cpu":
        return f"{cpu_model()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        return f"{properties.name}, capability {capability}, {properties.total_memory / 2**30:.0f} GiB"
    return device.type


def cpu_model() -> str:
    """The processor's name as its maker gives it, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def memory(device: torch.device) -> int:
    """Bytes of memory of the device; 4 GiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 4 * 2**30
