"""`swat-flex export`: a trained model as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swat_flex.training import SEPARATOR, load_checkpoint, model_of


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run for its newest.")],
    folder: Annotated[Path, typer.Argument(help="Where to; must not exist.")],
) -> None:
    """Write a trained model for transformers: weights, a tokenizer of bytes, settings and a model card."""
    try:
        from swat_flex.hf.folder import model_card, write_folder
    except ImportError as error:
        typer.echo(f"error: export needs the extra `hf` (transformers): {error}", err=True)
        raise typer.Exit(2) from error
    try:
        if folder.exists():
            raise FileExistsError(f"folder: expected a path that does not exist, got {str(folder)!r}")
        state = load_checkpoint(checkpoint)
        write_folder(model_of(state), folder, separator=SEPARATOR, card=model_card(folder.name, state))
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f'{folder}: import swat_flex.hf, then transformers.pipeline("text-generation", model="{folder}")')
