"""`swat-flex export`: a trained model as a folder that transformers loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from autotune.files import synchronise_folder
from swat_flex.training import SEPARATOR, load_model


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run for its newest.")],
    folder: Annotated[Path, typer.Argument(help="Where to; must not exist.")],
) -> None:
    """Write a trained model for transformers: config.json and model.safetensors. Its token ids are bytes."""
    try:
        from swat_flex.hf import SwatForCausalLM
    except ImportError as error:
        typer.echo(f"error: export needs the extra `hf` (transformers): {error}", err=True)
        raise typer.Exit(2) from error
    try:
        if folder.exists():
            raise FileExistsError(f"folder: expected a path that does not exist, got {str(folder)!r}")
        model = SwatForCausalLM.from_swat(load_model(checkpoint), eos_token_id=SEPARATOR)
        _write(model, folder)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f'{folder}: import swat_flex.hf, then AutoModelForCausalLM.from_pretrained("{folder}")')


def _write(model: Any, folder: Path) -> None:
    """The whole folder or none: beside it first, each file on the disk, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        partial.chmod(0o755)  # mkdtemp's own is for its maker alone
        synchronise_folder(partial)
        partial.rename(folder)
        synchronise_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
