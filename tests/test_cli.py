"""The commands as a user types them: what they print, what they write, how they refuse."""

import importlib.util
import math
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import swat_flex
from autotune import Timing
from autotune.memory import peak_bytes
from swat_flex import dispatch
from swat_flex.cli import app, check, machine, measure, options, report
from swat_flex.cli.measure import Measurement
from swat_flex.cli.text import embed, standard_library

PNG = b"\x89PNG\r\n\x1a\n"
TINY = ["demo", "--lengths", "48,24", "--window", "8", "--heads", "2", "--head-dim", "8", "--rounds", "2"]
CPU = torch.device("cpu")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: str) -> str:
    """The one line a wrong value is answered with."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("error: ")
    return line


def test_version():
    assert run("--version") == f"swat_flex {swat_flex.__version__}\n"


def test_module_runs_and_importing_the_commands_loads_no_matplotlib():
    code = "import swat_flex.cli, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    module = [sys.executable, "-m", "swat_flex", "--version"]
    assert swat_flex.__version__ in subprocess.run(module, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("256", 256),
        ("1", 1),
        ("128,16", (128, 16)),
        ("0, 0", (0, 0)),
        ("none,4", (None, 4)),
        ("None", None),
    ],
)
def test_window_text(text, window):
    assert options.window(text) == window


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1,-1", "1,2,3", "1.5", "1,"])
def test_wrong_window_text_is_refused_with_the_rule_and_the_value(text):
    line = refusal("show", f"--window={text}")
    assert "--window" in line
    assert "at least 1" in line
    assert line.endswith(f"got {text!r}")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["demo", "--dtype", "float33"], ["--dtype", "float32, bfloat16, float16, float64", "'float33'"]),
        (["demo", "--device", "cuda:99"], ["--device", "cpu", "'cuda:99'"]),
        (["demo", "--device", "toaster"], ["--device", "cpu", "'toaster'"]),
        (["demo", "--lengths", "64,0"], ["--lengths", "at least 1", "'64,0'"]),
        (["demo", "--lengths", "1e3"], ["--lengths", "tokens", "'1e3'"]),
        (["demo", "--lengths", "99999999999"], ["--lengths", "bytes of .py sources", "99999999999"]),
        (["demo", "--head-dim", "7"], ["--head-dim", "even number from 2 to 256", "7"]),
        (["demo", "--head-dim", "258"], ["--head-dim", "even number from 2 to 256", "258"]),
        (["demo", "--heads", "0"], ["--heads", "1 to", "0"]),
        (["demo", "--heads", "x"], ["--heads", "integer"]),
        (["demo", "--rounds", "0"], ["--rounds", "1 to", "0"]),
        (["demo", "--png", "no/such/folder/a.png"], ["--png", "folder", "no/such/folder/a.png"]),
        (["show", "--png", "."], ["--png", "'.'", "is a directory"]),
        (["show", "--slopes", "steep"], ["--slopes", "balanced, alibi, none", "'steep'"]),
        (["show", "--length", "0"], ["--length", "1 to 4096", "0"]),
        (["show", "--heads", "65"], ["--heads", "1 to 64", "65"]),
    ],
)
def test_a_wrong_value_gets_one_line(arguments, parts):
    line = refusal(*arguments)
    assert all(part in line for part in parts), line


def test_a_picture_without_matplotlib_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "swat_flex[plot]"' in refusal("show", "--png", str(tmp_path / "a.png"))


def test_missing_sources_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert refusal(*TINY).endswith("has bytes of .py sources, 0, got 48")


def test_demo_reports_every_contender_at_every_length(tmp_path):
    path = tmp_path / "times.png"
    page = run(*TINY, "--png", str(path))
    header, _, rest = page.partition("GFLOP/s")
    assert f"torch {torch.__version__}" in header
    assert machine.describe(CPU) in header
    assert "float32, window 8, 2 heads of 8" in header
    assert "causal softmax over all keys" in header
    rows = re.findall(r"^ *(\d*) (SWAT|naive|SDPA) ", rest, re.MULTILINE)
    assert rows == [("24", "SWAT"), ("", "naive"), ("", "SDPA"), ("48", "SWAT"), ("", "naive"), ("", "SDPA")]
    assert len(re.findall(r"\d×", rest)) == 8
    assert "Medians of 2 interleaved rounds" in rest
    assert "From 24 to 48 tokens, 2 times as many" in rest
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_demo_is_right_in_every_dtype(dtype):
    page = run(*TINY, "--dtype", dtype, "--lengths", "40", "--window", "none,3")
    assert "Right against the definition in float64 at 40 tokens" in page
    assert "At 40 tokens forward and backward took SWAT" in page


def test_demo_leaves_naive_out_where_its_memory_would_not_fit(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda device: 4 * 4 * 2 * 4 * 24 * 24)
    page = run(*TINY)
    long, short = (re.search(rf" {n} SWAT.*\n *naive(.*)\n", page).group(1).split() for n in (48, 24))
    assert long == ["-"] * 7
    assert "×" in short[-1]


def test_demo_times_nothing_that_is_wrong(monkeypatch):
    monkeypatch.setattr(check, "flex_swat", lambda *call, **options: swat_flex.flex_swat(*call, **options) * 1.001)
    monkeypatch.setattr("swat_flex.cli.demo.measure", lambda *_: pytest.fail("timed"))
    result = CliRunner().invoke(app, TINY)
    assert result.exit_code == 1
    assert "error: wrong result, nothing was timed" in result.output
    assert "×" not in result.output


def test_check_refuses_nan():
    assert not check.Errors(math.nan, 0.0, 1.0).right
    assert not check.Errors(0.0, math.nan, 1.0).right
    assert check.Errors(1.0, 1.0, 1.0).right


def test_the_text_is_the_same_every_time_and_its_logits_are_of_order_one():
    text = standard_library(256)
    assert text == standard_library(300)[:256]
    first, second = (embed(text, 4, 32, torch.float32, CPU) for _ in range(2))
    assert torch.equal(first.q, second.q)
    assert torch.equal(first.grad, second.grad)
    logits = first.q @ first.k.transpose(-1, -2) / 32**0.5
    assert 0.5 < logits.std() < 2
    assert first.prefix(100).k.shape == (1, 4, 100, 32)
    assert first.prefix(100).k.is_leaf


def test_measure_interleaves_and_counts_its_steps():
    inputs = embed(standard_library(8), 1, 4, torch.float32, CPU)
    calls, steps = [], []

    def named(name):
        return lambda q, k, v: (calls.append(name), q * k * v)[1]

    found = measure.measure({"a": named("a"), "b": named("b")}, inputs, 3, lambda: steps.append(None))
    first, second = calls.index("a"), calls.index("b")
    assert first < second
    assert "a" in calls[second:]  # again after b: in turn
    assert len(steps) == 2 * 2 * (3 + 1)
    assert set(found) == {"a", "b"}


def test_peak_bytes_sees_memory_that_is_freed_again():
    size = 64 * 2**20
    peak = peak_bytes(lambda: torch.ones(size // 4).sum().item(), CPU)
    assert peak is None or size * 0.95 < peak < size * 1.25


def test_report_counts_the_pairs_that_each_contender_sees():
    measured = {name: Measurement(Timing(2.0, 0.0, 3), Timing(4.0, 0.5, 3), 3 * 2**20) for name in ("SWAT", "SDPA")}
    q = torch.empty(1, 2, 4, 8)
    page = report.table({1000: measured}, q, 1)
    columns = [list(column.cells) for column in page.columns]
    assert columns[0] == ["1,000", "", ""]
    assert columns[3] == [f"{2 * 2 * 1000 * 16 / 2e6:.3g}", "-", f"{2 * 2 * 500500 * 16 / 2e6:.3g}"]
    assert columns[4] == ["4.00  50%", "-", "4.00  50%"]
    assert columns[6:] == [["3", "-", "3"], ["", "-", "1.0×"], ["", "-", "1.0×"]]


@pytest.mark.parametrize(("spread", "warns"), [(0.2, False), (0.5, True)])
def test_report_warns_where_times_are_unsteady(spread, warns):
    measured = {"SWAT": Measurement(Timing(1.0, 0.0, 3), Timing(2.0, spread, 3), None)}
    assert ("A spread of 50%" in report.notes({64: measured}, 3)) is warns


def test_info_names_versions_devices_and_what_runs():
    page = run("info")
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", page, re.MULTILINE)
    assert f"cpu: {machine.describe(CPU)}" in page
    assert re.search(r"^ *banded +yes ", page, re.MULTILINE)
    assert re.search(r"^cpp +.*(vectors of \d+ bits|compiler)", page, re.MULTILINE)
    assert re.search(r"^auto: (cpp|banded), ", page, re.MULTILINE)
    assert re.search(r"^swat_decode: (cpp|banded); triton: \w+", page, re.MULTILINE)


def test_info_says_why_not_and_lives_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name, module in dispatch.BACKENDS.items():
        monkeypatch.setattr(module, "supports", lambda problem, name=name: f"{name} is on holiday")
    page = run("info")
    assert re.search(r"^triton +not installed$", page, re.MULTILINE)
    assert re.search(r"^ *flex +no +flex is on holiday", page, re.MULTILINE)
    assert re.search(r"^auto: .*no backend on cpu fits", page, re.MULTILINE)


def test_show_draws_the_band_and_states_the_sign():
    page = run("show", "--window", "3", "--length", "8", "--heads", "2")
    lines = page.splitlines()
    assert lines[0] == "8 tokens, keys j with 0 ≤ i − j < 3 of query i; slopes: balanced"
    assert [line.rstrip() for line in lines[3:8]] == [
        "0: −0.5   1: 0.5",
        "▒▒        ▒▒",
        "░▒▒▒      ▓▒▒▒",
        "  ░▒▒▒      ▓▒▒▒",
        "    ░▒▒▒      ▓▒▒▒",
    ]
    assert "a negative slope favours recent keys" in page
    assert page == run("show", "--window", "3", "--length", "8", "--heads", "2")


@pytest.mark.parametrize(
    ("window", "rule"),
    [("4,2", "−2 ≤ i − j ≤ 4"), ("none", "0 ≤ i − j of"), ("none,none", "any i − j"), ("5,none", "with i − j ≤ 5")],
)
def test_show_states_the_window_in_symbols(window, rule):
    assert rule in run("show", "--window", window, "--slopes", "none").splitlines()[0]


@pytest.mark.parametrize("heads", ["1", "5", "12", "64"])
def test_show_fits_into_100_columns(heads):
    page = run("show", "--heads", heads, "--length", "4096", "--window", "1024", "--slopes", "alibi")
    assert max(map(len, page.splitlines())) <= 100
    assert all(f"{head}: −" in page for head in range(int(heads)))


def test_show_writes_a_picture(tmp_path):
    path = tmp_path / "band.png"
    assert f"Drawn into {path}" in run("show", "--png", str(path)).replace("\n", "")
    assert path.read_bytes().startswith(PNG)


def test_a_call_needs_torch_alone_and_the_command_line_says_what_it_lacks(monkeypatch):
    monkeypatch.setenv("CXX", "none")  # without platformdirs each process builds anew, as test_wheel.py does
    hidden = "import sys; sys.modules.update(dict.fromkeys(('rich', 'typer', 'platformdirs'))); "
    call = "import torch, swat_flex; print(swat_flex.flex_swat(*torch.ones(3, 1, 1, 9, 4), 3).shape)"
    done = subprocess.run([sys.executable, "-c", hidden + call], capture_output=True, text=True, check=True)
    assert done.stdout == "torch.Size([1, 1, 9, 4])\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + "import swat_flex.cli"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr[:28]) == (1, "error: swat-flex needs typer")
    assert 'pip install "swat_flex[cli]"' in done.stderr
