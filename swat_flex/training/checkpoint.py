"""Checkpoints: one file per step kept, whole or absent, read without running what it holds."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from autotune.files import write_whole

FORMAT = "swat_flex training 1"
KEPT = 2  # newest files; the one before the newest outlives damage to it


class CheckpointError(ValueError):
    """A file that is no whole checkpoint, or one of another run."""


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint of its step, then remove all but the newest KEPT.

    A crash at any moment leaves the earlier ones whole.

    Args:
        folder: is made where it is missing.
        state: plain values and tensors, with an int "step".
    """
    for left in folder.glob(".step-*.pt.*.tmp"):  # of a run that was killed
        left.unlink(missing_ok=True)
    path = folder / f"step-{state['step']:08d}.pt"
    write_whole(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    for old in checkpoints(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = {int(m[1]): path for path in folder.glob("step-*.pt") if (m := re.fullmatch(r"step-(\d+)\.pt", path.name))}
    return [found[step] for step in sorted(found)]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint and check every byte; tensors are on the CPU. A folder stands for its newest.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: damaged, or no checkpoint of this library; names the one before it where there is one.
    """
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            raise FileNotFoundError(
                f"checkpoint: expected a folder with checkpoints step-*.pt, got none in {str(path)!r}"
            )
        path = found[-1]
    if not path.exists():
        raise FileNotFoundError(f"checkpoint: expected a checkpoint or a folder of them, got {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise CheckpointError(f"wrong checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise CheckpointError(f"its format is not {FORMAT!r}")
    except Exception as error:  # whatever a damaged archive makes zipfile or torch raise
        raise CheckpointError(
            f"checkpoint: expected a whole checkpoint of swat-flex train, got {str(path)!r}: {_first_line(error)}"
            f"{_advice(path)}"
        ) from error
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _advice(path: Path) -> str:
    older = [other for other in checkpoints(path.parent) if other.name < path.name]
    return f"; move it away to go on from {older[-1].name}" if older else ""
