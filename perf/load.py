"""Does somebody else use the machine? A time taken then says little."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

CORES = 0.15  # of a core that others may use: a terminal, a clock, a log
GPU_PERCENT = 5
STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Load:
    """What others used meanwhile.

    Attributes:
        cores: CPU cores, on average; None where the system does not tell.
        gpu_percent: utilisation before the run; None without a GPU.
    """

    cores: float | None
    gpu_percent: int | None = None

    @property
    def busy(self) -> str | None:
        """Say what is wrong."""
        if self.cores is not None and self.cores > CORES:
            return f"other processes use {self.cores:.2f} of the CPU's cores, more than {CORES:g}"
        if self.gpu_percent is not None and self.gpu_percent > GPU_PERCENT:
            return f"other processes use {self.gpu_percent}% of the GPU, more than {GPU_PERCENT}%"
        return None


class Meter:
    """Cores used by everybody but this process and its children, from its making to `read`."""

    def __init__(self) -> None:
        self._start = _busy_seconds(), _own_seconds(), time.monotonic()

    def read(self) -> float | None:
        """Cores, on average since the start; None where /proc/stat does not tell."""
        busy, own, then = self._start
        now = _busy_seconds()
        elapsed = time.monotonic() - then
        if busy is None or now is None or elapsed <= 0:
            return None
        return max(0.0, (now - busy - (_own_seconds() - own)) / elapsed)


def look(device: str, seconds: float = 1.0) -> Load:
    """The load before a run, sampled while this process sleeps."""
    meter = Meter()
    time.sleep(seconds)
    return Load(meter.read(), _gpu_percent() if device == "cuda" else None)


def _busy_seconds() -> float | None:
    try:
        fields = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """This process's and its children's, in the hundredths of a second that /proc/stat counts in too."""
    return sum(os.times()[:4])


def _gpu_percent() -> int | None:
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return max(int(word) for word in found)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
