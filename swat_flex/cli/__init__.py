"""The command line `swat-flex`: one file per command."""

from swat_flex.cli.main import app

__all__ = ["app"]
