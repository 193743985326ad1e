"""The console on which commands print, and the bar that shows how far they are."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import Progress, ProgressColumn

WIDTH = 100  # columns of a page that is not a terminal


def console() -> Console:
    """Standard output: a terminal's own width, 100 columns into a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, emoji=False)


def bar(*columns: ProgressColumn, quiet: bool = False) -> Progress:
    """Show progress on standard error where that is a terminal."""
    shown = sys.stderr.isatty() and not quiet
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)
