"""Execute what lower.py wrote as compiled code, on the CPU: `python execute.py TARGET CASE.pt`.

Writes CASE.ran.pt: the results by name, and of each launch the kernel's name and what the execution showed.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import generated
import torch

from swat_flex.inspection import execute

TARGET, PATH = sys.argv[1], Path(sys.argv[2])
launches = []


def launch(module: types.ModuleType, kernel: object, meta: dict, grid: tuple, arguments: dict) -> None:
    """Compile as a launch on the target would, and execute."""
    options = {name: meta[name] for name in ("num_warps", "num_stages") if name in meta}
    launches.append((kernel.__name__, execute(kernel, TARGET, grid, arguments, **options)))


results = generated.run(PATH, launch)
torch.save({"results": results, "launches": launches}, PATH.with_suffix(".ran.pt"))
