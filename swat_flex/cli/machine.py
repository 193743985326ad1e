"""This machine: its devices, their names and their memory. Nothing here fails on what is absent."""

from __future__ import annotations

import os

import torch

from autotune import describe_device


def devices() -> list[str]:
    """Every device that tensors can live on: "cpu", then "cuda:0", "mps:0" and so on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]


def describe(device: torch.device) -> str:
    """One line: model, and threads of a CPU, compute capability and memory of a CUDA device."""
    if device.type == "cpu":
        cpu = describe_device(device)
        return f"{cpu.name}, {cpu.units} threads, {cpu.capability}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        return f"{properties.name}, capability {capability}, {properties.total_memory / 2**30:.0f} GiB"
    return device.type


def memory(device: torch.device) -> int:
    """Bytes of memory of the device; 4 GiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return 4 * 2**30
