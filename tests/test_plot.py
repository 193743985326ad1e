"""The picture's grid against a loop over pairs, and the files it is drawn into."""

import math

import pytest
import torch

from swat_flex import balanced_alibi_slopes, plot
from swat_flex.window import Window

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("window", [Window(2, 0), Window(3, 1), Window(None, 0), Window(None, None)])
def test_a_cell_holds_the_mean_distance_of_its_visible_pairs(window):
    length, queries, keys = 7, 3, 2
    grid = plot.mean_distance(window, length, queries, keys)
    assert grid.shape == (3, 4)
    for row in range(3):
        for column in range(4):
            seen = [
                abs(i - j)
                for i in range(queries * row, min(queries * (row + 1), length))
                for j in range(keys * column, min(keys * (column + 1), length))
                if (window.left is None or i - j <= window.left) and (window.right is None or j - i <= window.right)
            ]
            value = float(grid[row, column])
            assert value == pytest.approx(sum(seen) / len(seen)) if seen else math.isnan(value)


def test_band_draws_one_panel_per_head_and_a_colour_bar_in_logits():
    figure = plot.band(Window(15, 0), balanced_alibi_slopes(5), 40)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [
        "head 0: slope −0.5",
        "head 1: slope −0.25",
        "head 2: slope −0.125",
        "head 3: slope 0.5",
        "head 4: slope 0.25",
    ]
    assert "logits" in figure.axes[-1].get_ylabel()
    bias = figure.axes[0].images[0].get_array()
    assert bias[20, 20] == 0
    assert bias[20, 10] == -5
    assert bias.mask[20, 4]  # 16 tokens back, just outside
    assert bias.mask[20, 21]  # the future
    assert not bias.mask[20, 5]


def test_band_stops_its_colours_where_the_sigmoid_is_saturated():
    figure = plot.band(Window(None, 0), torch.tensor([-1.0]), 40)
    assert figure.axes[0].images[0].get_clim() == (-8, 8)


def test_band_shrinks_long_sequences():
    figure = plot.band(Window(99, 0), torch.tensor([-1.0]), 1000)
    assert figure.axes[0].images[0].get_array().shape == (250, 250)


def test_times_draws_each_series_and_its_ratio_to_the_first():
    milliseconds = {"SWAT": [1.0, 2.0], "naive": [4.0, math.nan], "SDPA": [2.0, 8.0]}
    figure = plot.times([64, 128], milliseconds, "a title")
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["SWAT", "naive", "SDPA"]
    assert list(left.lines[2].get_ydata()) == [2.0, 8.0]
    assert list(right.lines[1].get_ydata()) == [2.0, 4.0]
    assert right.lines[1].get_label() == "against SDPA"
    assert figure.get_suptitle() == "a title"


def test_save_replaces_a_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("old")
    plot.save(plot.band(Window(3, 0), torch.zeros(1), 8), path)
    assert path.read_bytes().startswith(PNG)
    assert list(tmp_path.iterdir()) == [path]


def test_save_that_fails_keeps_the_old_file(tmp_path):
    class Broken:
        def savefig(self, file, **options):
            file.write(b"half")
            raise RuntimeError("disk on fire")

    path = tmp_path / "picture.png"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk on fire"):
        plot.save(Broken(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "swat_flex\[plot\]"'):
        plot.times([1], {"SWAT": [1.0]}, "")
