"""Pictures of the window, the bias and measured times. Drawing needs matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swat_flex.window import Window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PIXELS = 256  # cells along a panel's side at most
SATURATED = 8.0  # logits; beyond them σ is within 0.0004 of 0 or 1, and colours stop changing
HIDDEN = "0.82"  # grey of the pairs outside the window
STYLES = (("#0072B2", "o"), ("#595959", "s"), ("#D55E00", "^"), ("#009E73", "D"))  # distinct to colour-blind eyes


def mean_distance(window: Window, length: int, queries: int, keys: int) -> Tensor:
    """Mean |i − j| in tokens over the visible pairs of each cell of `queries` × `keys` tokens; the last may be smaller.

    Returns:
        float32 `[⌈length / queries⌉, ⌈length / keys⌉]`, NaN where a cell's queries see none of its keys. Multiplied by
        a slope it is the cell's mean bias in logits.
    """
    token = torch.arange(length)
    distance = token[:, None] - token
    visible = window.sees(distance)
    rows, columns = F.one_hot(token // queries).float(), F.one_hot(token // keys).float()  # [length, cells]
    pairs = rows.T @ visible.float() @ columns
    return rows.T @ (distance.abs() * visible).float() @ columns / pairs  # 0 / 0 is NaN


def panels(heads: int) -> tuple[int, int]:
    """Rows and columns in which the heads' panels are laid out: at most 4 in a row, 8 where there are many."""
    down = -(-heads // (4 if heads <= 8 else 8))
    return down, -(-heads // down)


def band(window: Window, slopes: Tensor, length: int) -> Figure:
    """The bias inside the band, one panel per head; hidden pairs are grey.

    Args:
        window: which keys a query sees.
        slopes: `[H]`, logits per token of distance; negative favours recent keys.
        length: tokens.
    """
    heads = len(slopes)
    down, across = panels(heads)
    figure = _figure(figsize=(1.3 + 1.9 * across, 0.7 + 2.0 * down))
    cell = -(-length // PIXELS)
    biases = slopes.cpu().float()[:, None, None] * mean_distance(window, length, cell, cell)  # [H, cells, cells]
    largest = float(biases.nan_to_num(0.0).abs().max())
    limit = min(largest, SATURATED) or 1.0
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for panel in axes.flat[heads:]:
        panel.set_axis_off()
    for head, panel in enumerate(axes.flat[:heads]):
        panel.set_facecolor(HIDDEN)
        end = biases.shape[1] * cell - 0.5
        image = panel.imshow(
            biases[head].numpy(), cmap="PuOr_r", vmin=-limit, vmax=limit, extent=(-0.5, end, end, -0.5)
        )
        panel.set_title(f"head {head}: slope {float(slopes[head]):.3g}".replace("-", "−"), fontsize=9)
        panel.tick_params(labelsize=8)
    figure.supxlabel("key (tokens)", fontsize=9)
    figure.supylabel("query (tokens)", fontsize=9)
    bar = figure.colorbar(image, ax=axes, extend="both" if largest > limit else "neither", shrink=0.8, pad=0.02)
    bar.set_label("bias in logits; hidden pairs are grey", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def times(lengths: Sequence[int], milliseconds: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Time against length, and how many times longer than the first series the others take.

    Args:
        lengths: tokens.
        milliseconds: one series per contender, in the order of the lengths; NaN where there is no time.
        title: what was measured, on what.
    """
    figure = _figure(figsize=(9.0, 4.0))
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    first = next(iter(milliseconds))
    for (name, series), (colour, marker) in zip(milliseconds.items(), STYLES, strict=False):
        left.plot(lengths, series, color=colour, marker=marker, label=name)
        if name != first:
            ratios = [other / mine for other, mine in zip(series, milliseconds[first], strict=True)]
            right.plot(lengths, ratios, color=colour, marker=marker, label=f"against {name}")
    right.axhline(1.0, color=STYLES[0][0], linewidth=1.0, linestyle="--")
    _length_axis(left, lengths, "ms")
    _length_axis(right, lengths, f"speed-up of {first}")
    return figure


def _length_axis(panel: Axes, lengths: Sequence[int], quantity: str) -> None:
    """Both axes in powers, the lengths themselves as ticks."""
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
    panel.set_xlabel("length (tokens)")
    panel.set_ylabel(quantity)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all."""
    from autotune.files import write_whole

    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _figure(**options: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib: needed to draw, not installed; pip install "swat_flex[plot]"') from error
    return Figure(layout="constrained", **options)
