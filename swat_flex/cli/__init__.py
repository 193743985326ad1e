"""The command line `swat-flex`: one file per command."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from swat_flex.cli import inspect


class _Commands(TyperGroup):
    """A wrong value is answered with one line on standard error and exit status 2."""

    def invoke(self, ctx: Any) -> Any:  # the base class's own context type is private to typer
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            typer.echo(f"error: {error.format_message()}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("inspect")(inspect.inspect)


@app.callback()
def main() -> None:
    """Sliding-window sigmoid attention (SWAT, arXiv 2502.18845)."""
