"""What a measurement belongs to: the device and the versions of what compiles for it."""

import importlib
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """The part of a device on which the fastest configuration depends.

    Attributes:
        kind: "cuda", "rocm", "cpu", or torch's name of another device type.
        name: the model.
        capability: compute capability ("9.0"), gfx architecture, or the vector instructions of a CPU ("AVX512").
        units: multiprocessors, or torch's threads on a CPU; 0 where unknown.
    """

    kind: str
    name: str
    capability: str
    units: int


@dataclass(frozen=True)
class Versions:
    """Installed versions of torch (with its build suffix) and triton (None without it)."""

    torch: str
    triton: str | None


def describe_device(device: "torch.device | str" = "cpu") -> Device:
    """Describe `device` by what the fastest configuration depends on.

    Raises:
        ValueError: a CUDA or ROCm device on a machine without one.
    """
    import torch  # here, not above: a command that only reads the store starts without it

    device = torch.device(device)
    if device.type == "cpu":
        return Device("cpu", _cpu_model(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    if device.type != "cuda":
        return Device(device.type, platform.processor() or platform.machine(), "", 0)
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected one of this machine, which has no usable GPU, got {device}")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Device("rocm", properties.name, properties.gcnArchName, properties.multi_processor_count)
    capability = f"{properties.major}.{properties.minor}"
    return Device("cuda", properties.name, capability, properties.multi_processor_count)


def installed_versions() -> Versions:
    """Read the versions that this process compiles and runs with."""
    import torch

    try:
        # Asked of the module, not of the package index: the distribution is called differently on ROCm and nightlies.
        triton: str | None = importlib.import_module("triton").__version__
    except ImportError:
        triton = None
    return Versions(str(torch.__version__), triton)


def _cpu_model() -> str:
    """The CPU's marketing name where the system tells it, else its architecture."""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()
