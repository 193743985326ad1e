"""The console on which commands print."""

from __future__ import annotations

import sys

from rich.console import Console

WIDTH = 100  # columns of a page that is not a terminal


def console() -> Console:
    """Standard output: a terminal's own width, 100 columns into a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, emoji=False)
