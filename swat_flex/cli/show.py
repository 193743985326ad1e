"""`swat-flex show`: which pairs each head sees, and the bias it adds to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text
from torch import Tensor

from swat_flex import plot
from swat_flex.cli import options, screen
from swat_flex.positions import alibi_slopes, balanced_alibi_slopes
from swat_flex.window import Window

LONGEST = 4096  # tokens; the picture shrinks a square of this side
GAP = 2  # columns between panels
WIDEST = 40  # columns of a panel

STEPS = (1.0, 4.0)  # logits; a level ends where |bias| reaches one
# Glyph, colour and words of each level: the fuller, the heavier a key for the same ⟨q, k⟩; violet is below 0.
LEVELS = (
    ("·", "color(99)", "≤ −4"),
    ("░", "color(99)", "≤ −1"),
    ("▒", "", "between"),
    ("▓", "color(172)", "≥ 1"),
    ("█", "color(172)", "≥ 4"),
)
SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "balanced": balanced_alibi_slopes,
    "alibi": alibi_slopes,
    "none": torch.zeros,
}


def show(
    window: Annotated[str, typer.Option(help="Keys per query, or left,right, or none.")] = "16",
    length: Annotated[int, typer.Option(help=f"Tokens, at most {LONGEST}.")] = 64,
    heads: Annotated[int, typer.Option(help="Attention heads, at most 64.")] = 8,
    slopes: Annotated[str, typer.Option(help=f"{', '.join(SCHEDULES)}.")] = "balanced",
    png: Annotated[Path | None, typer.Option(help="Draw the picture into this file too.")] = None,
) -> None:
    """Draw the window and the bias of every head."""
    sides, png = Window.of(options.window(window)), options.picture(png)
    options.whole("--length", length, 1, LONGEST)
    schedule = SCHEDULES[options.one_of("--slopes", slopes, SCHEDULES)]
    per_head = schedule(options.whole("--heads", heads, 1, 64))
    console = screen.console()
    console.print(f"{length} tokens, keys j with {_rule(sides)} of query i; slopes: {slopes}")
    console.print("A panel is a head under its slope; queries run downwards, keys rightwards.\n")
    console.print(_panels(sides, per_head, length, min(console.width, screen.WIDTH)))
    console.print("Bias in logits, slope × distance: a negative slope favours recent keys, a positive one old keys.")
    console.print(_legend())
    if png is not None:
        plot.save(plot.band(sides, per_head, length), png)
        console.print(f"Drawn into {png}")


def _rule(window: Window) -> str:
    """Which keys j a query i sees, in symbols.

    >>> _rule(Window.of(256))
    '0 ≤ i − j < 256'
    """
    if window.right == 0 and window.left is not None:
        return f"0 ≤ i − j < {window.left + 1}"
    lower = "" if window.right is None else f"{-window.right} ≤ ".replace("-", "−")
    upper = "" if window.left is None else f" ≤ {window.left}"
    return f"{lower}i − j{upper}" if lower or upper else "any i − j"


def _panels(window: Window, slopes: Tensor, length: int, width: int) -> Table:
    """Every head's panel, as many side by side as fit; a character is twice as high as wide."""
    heads = len(slopes)
    _, across = plot.panels(heads)
    keys = -(-length // max(1, min(WIDEST, (width + GAP) // across - GAP)))
    distance = plot.mean_distance(window, length, 2 * keys, keys)
    page = Table.grid(padding=(0, GAP))
    panels = [_panel(head, float(slope), distance) for head, slope in enumerate(slopes)]
    for first in range(0, heads, across):
        page.add_row(*panels[first : first + across])
    return page


def _panel(head: int, slope: float, distance: Tensor) -> Text:
    panel = Text(no_wrap=True)
    panel.append(f"{head}: {slope:.3g}\n".replace("-", "−"), "bold")
    for row in (slope * distance).tolist():
        for bias in row:
            panel.append(*_cell(bias))
        panel.append("\n")
    return panel


def _cell(bias: float) -> tuple[str, str]:
    """Glyph and colour of a mean bias in logits; NaN is hidden."""
    if math.isnan(bias):
        return " ", ""
    steps = sum(abs(bias) >= step for step in STEPS)
    glyph, colour, _ = LEVELS[2 + (steps if bias > 0 else -steps)]
    return glyph, colour


def _legend() -> Text:
    legend = Text()
    for glyph, colour, words in LEVELS:
        legend.append(glyph, colour).append(f" {words}   ")
    return legend.append("blank: hidden")
