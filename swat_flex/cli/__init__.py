"""The command line `swat-flex`: one file per command."""

try:
    from swat_flex.cli.main import app
except ModuleNotFoundError as missing:  # only the command line needs them
    if missing.name not in ("rich", "typer"):
        raise
    raise SystemExit(f'error: swat-flex needs {missing.name}: pip install "swat_flex[cli]"') from None

__all__ = ["app"]
