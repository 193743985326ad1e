"""Count the memory that a run needs at its peak."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def peak_bytes(run: Callable[[], object], device: "torch.device") -> int | None:
    """Run once and count the bytes of memory needed at the peak beyond those held before; None where nobody counts.

    On CUDA the allocator's own count; on Linux's CPUs the resident set, which sees every library's workspaces.
    """
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _lower_high_water_mark():
        return None
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _lower_high_water_mark() -> bool:
    """Bring the resident set's high-water mark down to the present; False where the system cannot.

    The heap is trimmed first, so that memory freed earlier is not taken for memory in use.
    """
    if sys.platform != "linux":
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):  # a C library without malloc_trim, or a sandbox without clear_refs
        return False
    return True


def _resident(field: str) -> int:
    """A field of the process's status, in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024  # "1234 kB"
