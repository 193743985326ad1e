"""`python -m perf`, the load of the machine, the report of a GPU, the benchmarks' baseline."""

import ast
import json
from pathlib import Path

import pytest
import torch
from perf_fakes import CPU, TINY, WindowTooWide
from typer.testing import CliRunner

import swat_flex
from perf import __main__ as cli
from perf import load, regression
from perf.measure import Setting
from perf.peers.ours import Naive, Swat
from perf.record import load as read
from perf.suites import Suite, suite

QUIET = load.Load(0.0)
ROOT = Path(swat_flex.__file__).parent.parent


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def tiny(monkeypatch):
    """A suite of one tiny case, on a quiet machine."""

    def choose(peers):
        monkeypatch.setattr(cli, "suite", lambda name, quick: Suite(name, CPU, (TINY,), tuple(peers)))
        monkeypatch.setattr(load, "look", lambda device: QUIET)
        monkeypatch.setattr(Setting, "of", classmethod(lambda cls, device, quick: cls(device, 2, sizes=(64, 2**16))))

    return choose


def test_a_run_prints_every_peer_and_its_record_prints_the_same(tiny, tmp_path):
    tiny([Swat("banded"), Naive(), Swat("triton")])
    found = run("--json", tmp_path / "r.json", "--png", tmp_path / "r.png")
    assert found.exit_code == 0, found.output
    assert "swat triton skipped: " in found.stdout
    assert run("report", tmp_path / "r.json").stdout == found.stdout
    assert (tmp_path / "r.png").stat().st_size > 1000
    kept = read(tmp_path / "r.json")
    assert [race.passes for race in kept.races] == ["forward", "both"]
    assert kept.commit != ""


def test_a_wrong_contender_of_ours_ends_with_an_error_and_is_recorded(tiny, tmp_path):
    tiny([Swat("banded"), WindowTooWide()])
    found = run("--json", tmp_path / "r.json")
    assert found.exit_code == 1
    assert "one key too many refused: wrong" in found.stdout
    assert read(tmp_path / "r.json").races[0].row("one key too many") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "tpu"], "expected one of cpu, gpu, decode, scaling, got 'tpu'"),
        (["report", "absent.json"], "absent.json"),
        (["regression", "absent.json"], "absent.json"),
    ],
)
def test_a_wrong_value_is_named(words, said):
    found = run(*words)
    assert found.exit_code != 0
    assert said in " ".join(found.stderr.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_suite_and_its_report_say_so():
    assert "needs a CUDA device" in run("--suite", "gpu").stderr
    found = run("gpu-report")
    assert found.exit_code == 1
    assert "gpu-report needs a CUDA device, and this machine has none" in found.stderr


def test_a_busy_machine_is_refused_and_may_be_insisted_on(tiny, monkeypatch, tmp_path):
    tiny([Swat("banded")])
    monkeypatch.setattr(load, "look", lambda device: load.Load(1.25))
    refused = run("--json", tmp_path / "r.json")
    assert refused.exit_code == 1
    assert "other processes use 1.25 of the CPU's cores" in refused.stderr
    assert "--busy-ok" in refused.stderr
    assert not (tmp_path / "r.json").exists()
    insisted = run("--busy-ok", "--json", tmp_path / "r.json")
    assert insisted.exit_code == 0
    assert "WARNING" in insisted.stderr
    assert read(tmp_path / "r.json").busy_ok


def test_load_is_what_others_used(monkeypatch, tmp_path):
    """Two cores for 10 s, 4 s of them busy, 1 s of that our own: 0.3 of a core."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(load, "STAT", stat)
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    clock, own = iter([50.0, 60.0]), iter([7.0, 8.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(load, "_own_seconds", lambda: next(own))
    stat.write_text("cpu  1000 0 500 9000 0 0 0 0 0 0\ncpu0 …")
    meter = load.Meter()
    stat.write_text("cpu  1250 50 600 10600 0 0 0 0 0 0\ncpu0 …")
    assert meter.read() == pytest.approx(0.3)
    assert load.Load(0.3).busy
    assert load.Load(0.1).busy is None
    assert load.Load(None).busy is None
    assert load.Load(0.0, 40).busy
    stat.write_text("what is this")
    assert load._busy_seconds() is None


def benchmarks(tmp_path, **medians):
    file = tmp_path / "now.json"
    rows = [
        {"group": "forward", "param": name, "name": f"bench[{name}]", "stats": {"median": m}}
        for name, m in medians.items()
    ]
    file.write_text(json.dumps({"benchmarks": rows, "machine_info": {}}))
    return file


def test_a_slower_machine_is_no_regression_and_a_slower_kernel_is(tmp_path):
    baseline = tmp_path / "baseline.json"
    regression.save(benchmarks(tmp_path, matmul=0.1, banded=0.05, naive=1.0), baseline)
    _, slower = regression.compare(benchmarks(tmp_path, matmul=0.4, banded=0.2, naive=4.0), baseline)
    assert slower == []
    _, slower = regression.compare(benchmarks(tmp_path, matmul=0.1, banded=0.07, naive=3.0), baseline)
    assert slower == ["forward: banded"]
    with pytest.raises(ValueError, match="matmul in every group"):
        regression.ratios(benchmarks(tmp_path, banded=0.1))


def test_suites_are_known_by_name():
    assert suite("cpu", quick=True).device == CPU
    assert {case.axis for case in suite("scaling", quick=False).cases} == {"length", "window", "heads"}
    with pytest.raises(ValueError, match="got 'x'"):
        suite("x", quick=False)


def test_nothing_imports_perf():
    for package in ("swat_flex", "autotune"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not any(name.split(".")[0] == "perf" for name in names), file


def test_perf_imports_only_the_two_packages_it_measures():
    """And no package of a peer while it is imported: those belong to their adapters."""
    allowed = {"perf", "swat_flex", "autotune", "torch", "rich", "typer"}
    for file in (ROOT / "perf").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or top in __import__("sys").stdlib_module_names or top == "pytest", (file, name)
