"""The application: its commands, `--version`, and errors in one line."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import swat_flex
from swat_flex.cli import demo, export, fuzz, generate, info, inspect, show, train, tune


class _Commands(TyperGroup):
    """A wrong value is answered with one line on standard error and exit status 2."""

    def invoke(self, ctx: Any) -> Any:  # the base class's own context type is private to typer
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            typer.echo(f"error: {error.format_message()}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(demo.demo)
app.command()(fuzz.fuzz)
app.command()(info.info)
app.command()(inspect.inspect)
app.command()(show.show)
app.command()(tune.tune)
app.command()(train.train)
app.command()(generate.generate)
app.command()(export.export)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"swat_flex {swat_flex.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sliding-window sigmoid attention (SWAT, arXiv 2502.18845)."""
