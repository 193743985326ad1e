"""What the CPU's kernels are held to: measured once on tiny cases, read off a record, printed."""

import io
from dataclasses import replace

import pytest
import torch
from perf_fakes import CPU, race, record, row
from rich.console import Console

from perf import bars, cases, readme, report
from perf.cases import PASSES, pretend
from perf.measure import Setting
from swat_flex.backends.cpp import library
from swat_flex.training import SIZES, read_corpus


def bars_record(ms=10.0):
    """Everybody takes `ms`, but FlexAttention twice and SDPA five times as long; 1.8 GFLOP where matmul does 2."""
    races = []
    for case, passes, peers in bars.contests():
        factor = {"FlexAttention softmax": 2, "SDPA causal": 5}
        rows = [row(peer.name, ms * factor.get(peer.name, 1), 1.8e9, bytes=2**24) for peer in peers]
        races.append(race(case, passes, rows, peers[0].name))
    figures = {f"beside a busy process, layer, {passes}, swat cpp": 1.5 * ms for passes in PASSES}
    return record("bars", races, figures=figures | {"training, cpp": 20000.0, "training, banded": 10000.0})


def test_every_bar_is_read_off_a_record():
    found = {line.what: line for line in bars.lines(bars_record())}
    assert len(found) == 2 * 6 + 3 + 2 * 3 + 1
    share = found["layer, forward: share of matmul"]
    assert (share.value, share.holds) == (pytest.approx(0.9), True)
    assert found["layer, forward: faster than FlexAttention softmax"].value == 2
    assert not found["small window, forward: faster than FlexAttention softmax"].holds
    assert found["layer, forward and backward: faster than SDPA causal"].holds
    assert found["beside a busy process over alone, forward"].value == 1.5
    assert found["bfloat16 over float32, forward and backward"].value == 1
    step = found["decoding step: bytes of keys and values over a copy's read rate"]
    assert step.value == pytest.approx(2**24 / 10e-3 / 1e10)
    assert not step.holds


def test_a_page_and_a_terminal_say_which_bar_is_missed():
    block = readme.block(bars_record(), "bars.json")
    assert "| layer, forward: share of matmul | 0.90 | at least 0.85 |" in block
    assert "| small window, forward: faster than FlexAttention softmax | 2.00 | at least 2.5, missed |" in block
    assert "20,000 tokens per second with cpp, 10,000 tokens per second with banded" in block
    page = Console(file=io.StringIO(), width=140)
    report.show(bars_record(), page)
    assert "missed" in page.file.getvalue()


@pytest.mark.skipif(library.trouble() is not None, reason="no C++ compiler")
def test_all_of_it_is_measured_in_one_run(monkeypatch, tmp_path):
    """On tiny cases, without FlexAttention, which compiles for half a minute."""
    (tmp_path / "text.txt").write_text("a line of text\n" * 2000)
    few = [
        (pretend(case), passes, tuple(peer for peer in peers if "Flex" not in peer.name))
        for case, passes, peers in bars.contests()
    ]
    monkeypatch.setattr(bars, "LAYER", few[0][0])
    monkeypatch.setattr(bars, "contests", lambda: [(few[0][0] if c.name == "layer" else c, p, x) for c, p, x in few])
    monkeypatch.setattr(bars, "SIZES", {"small": SIZES["tiny"]})
    monkeypatch.setattr(bars, "read_corpus", lambda: read_corpus(tmp_path))
    races, figures = bars.measure(Setting(CPU, 2, sizes=(64, 2**16)), lambda _: None)
    assert all(row.status == "timed" for race in races for row in race.rows)
    assert all(set(race.ceilings) == {"matmul", "copy"} for race in races)
    assert len(figures) == 4 + 2
    assert all(value > 0 for value in figures.values())
    without = [line.what for line in bars.lines(bars_record()) if "Flex" not in line.what]
    assert [line.what for line in bars.lines(replace(bars_record(), races=races, figures=figures))] == without


def test_the_cases_are_those_that_the_bars_name():
    names = {case.name for case, _, _ in bars.contests()}
    assert set(bars.SHARES) < names
    assert {case.name for case in cases.BARS.values()} < names
    assert cases.BARS["odd shape"].sizes == "B3 H5/1 L1531 D48 W97 float32"
    assert bars.contests()[0][0].torch_dtype == torch.float32
