"""Cases, the search, its file, and the command `swat-flex fuzz`."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("hypothesis")

from hypothesis import given
from planting import Fault, planted

from swat_flex.cli import app
from swat_flex.cli import fuzz as command
from swat_flex.testing import fuzz
from swat_flex.testing.case import LAYOUTS, SwatCase
from swat_flex.testing.check import Verdict, check
from swat_flex.testing.fuzz import Failure, Plan
from swat_flex.testing.strategies import FAMILIES, cases_for, swat_cases
from swat_flex.testing.workers import Passed

REPOSITORY = Path(__file__).parents[2]
OFF_BY_ONE = Fault(
    "banded", "mask off by one", "backends.banded.tiles", "self.left_edge] <= left)", "self.left_edge] < left)"
)


def forever():
    return False


def found(seed):
    with planted(OFF_BY_ONE):
        return fuzz.search(Plan(("banded",), seed=seed), lambda *_: None, forever)


@given(case=swat_cases())
def test_a_case_survives_json(case):
    assert SwatCase.from_json(json.loads(json.dumps(case.to_json()))) == case
    assert eval(repr(case)) == case
    first, second = case.tensors(), case.tensors()
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected schema 1, got list"),
        ({"schema": 7}, "expected schema 1, got 7"),
        ({"schema": 1, "length": 3, "window": 2, "colour": 1}, "got colour"),
        ({"schema": 1, "length": 3}, "window"),
    ],
)
def test_a_record_that_is_no_case_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        SwatCase.from_json(record)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_change_strides_and_not_shapes(layout):
    case = SwatCase(9, 3, batch=2, kv_heads=2, group=2, head_dim=4, value_dim=6, layouts=(layout,) * 4)
    q, k, v = case.tensors()
    assert [list(x.shape) for x in (q, k, v)] == [[2, 4, 9, 4], [2, 2, 9, 4], [2, 2, 9, 6]]
    assert case.gradient().shape == (2, 4, 9, 6)
    assert q.is_contiguous() == (layout == "contiguous")
    check(case, "banded")


@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_a_family_of_flex_shares_one_program(family):
    """Lengths up to one tile, options that do not tell programs apart."""
    seen = set()

    @given(case=cases_for("flex", family=family))
    def collect(case):
        assert case.length <= 128
        given_ids = case.documents != "none", None if case.documents == "none" else case.options()["document_ids"].dtype
        sizes = case.batch, case.kv_heads, case.group, case.head_dim, case.value_dim, case.scale, case.activation
        seen.add((*sizes, *given_ids, case.slopes == "none", case.logit_bias == "none"))

    collect()
    assert len(seen) == 1


def test_what_overflows_is_excluded():
    case = SwatCase(20, None, dtype="float16", v_exponent=15)
    assert check(case, "banded").excluded


def test_a_result_of_another_shape_or_a_nan_is_wrong(monkeypatch):
    case = SwatCase(20, 5)
    real = SwatCase.call
    for spoil in (lambda x: x[..., :1], lambda x: x * float("nan")):
        monkeypatch.setattr(SwatCase, "call", lambda *a, s=spoil, **k: {n: s(x) for n, x in real(*a, **k).items()})
        with pytest.raises(AssertionError, match="out: "):
            check(case, "banded")


def test_the_search_finds_shrinks_and_repeats():
    """The same seed finds the same case; the smallest that shows a mask off by one has two tokens."""
    first, second = found(3), found(3)
    assert first == second
    assert first.case.length <= 3
    assert first.case.dtype == "float32"
    assert "exact" in first.text


def test_every_kind_of_case_is_drawn_and_none_twice(monkeypatch):
    drawn = []
    monkeypatch.setattr(fuzz, "check", lambda case, *_: drawn.append(case) or Verdict())
    fuzz.search(Plan(("banded",), seed=8), lambda *_: None, lambda: len(drawn) > 350)
    assert len(set(drawn)) == len(drawn)
    assert any(case.ring for case in drawn)
    assert any(case.shards for case in drawn)
    assert any(case.length > 1000 for case in drawn)
    tails = [case for case in drawn if case.slopes == "none" and case.logit_bias == "number" and case.bias == -20.0]
    assert any(case.q_heads * case.batch * case.length > 200 for case in tails)


@given(case=cases_for("banded", kind="shards"))
def test_shards_make_the_whole(case):
    assert check(case, "banded").use <= 1


def test_the_page_on_numerics_claims_no_more_than_the_record_holds():
    record = json.loads((REPOSITORY / "perf/results/fuzz.json").read_text())
    page = " ".join((REPOSITORY / "docs/numerics.md").read_text(encoding="utf-8").split())  # as it is read
    claimed = re.search(r"\*\*([\d,]+) cases\*\* of (\d+) seeds, no alarm", page)
    assert int(claimed[1].replace(",", "")) <= record["cases"]
    assert int(claimed[2]) <= record["seeds"]
    assert record["failures"] == 0
    cases = dict.fromkeys(("cpp", "banded", "naive", "flex", "triton"), 0)
    for name, count in record["counts"].items():
        cases[name.split()[0]] += count["cases"]
    for name, counted in cases.items():
        assert int(re.search(rf"`{name}` ([\d,]+)", page[claimed.start() :])[1].replace(",", "")) <= counted, name


def test_a_failure_is_written_whole_and_fails_again(tmp_path):
    path = tmp_path / "failure.json"
    failure = found(1)
    failure.save(path)
    assert [x.name for x in tmp_path.iterdir()] == ["failure.json"]
    loaded = Failure.load(path)
    assert loaded == failure
    assert len(loaded.reproducer().splitlines()) == 3
    with planted(OFF_BY_ONE):
        assert fuzz.replay(loaded) == failure
        result = CliRunner().invoke(app, ["fuzz", "--replay", str(path)])
        assert result.exit_code == 1
        assert failure.text in result.output
        with pytest.raises(AssertionError):
            exec(loaded.reproducer(), {})
    assert fuzz.replay(loaded) is None
    assert CliRunner().invoke(app, ["fuzz", "--replay", str(path)]).exit_code == 0
    exec(loaded.reproducer(), {})


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    failure = Failure(SwatCase(1, 1), "banded", "cpu", "wrong")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        failure.save(tmp_path / "failure.json")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_search_and_report():
    result = CliRunner().invoke(app, ["fuzz", "--seconds", "2", "--backend", "banded", "--dtype", "float32,float16"])
    assert result.exit_code == 0, result.output
    assert "banded warmed up in" in result.output
    assert "float16" in result.output
    assert "bfloat16" not in result.output
    assert "worst use" in result.output


class _Staged:
    """A search whose messages are known."""

    def __init__(self, *messages):
        self.messages = messages

    def __call__(self, *_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        for message in self.messages:
            if isinstance(message, signal.Signals):
                signal.raise_signal(message)
            yield message


def test_the_command_stops_at_a_failure_and_writes_it(tmp_path, monkeypatch):
    failure = Failure(SwatCase(2, (1, None)), "banded", "cpu", "out: wrong")
    monkeypatch.setattr(command, "Search", _Staged(Passed("banded", "float32", Verdict(0.5, "dq")), failure))
    path = tmp_path / "failure.json"
    result = CliRunner().invoke(app, ["fuzz", "--output", str(path)])
    assert result.exit_code == 1
    assert failure.reproducer() in result.output
    assert f"--replay {path}" in result.output
    assert Failure.load(path) == failure


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_campaign_that_counts_what_was_checked(tmp_path, monkeypatch, number):
    before, path = signal.getsignal(number), tmp_path / "record.json"
    passed = Passed("banded", "float32", Verdict(0.5, "dq"))
    monkeypatch.setattr(command, "Search", _Staged(passed, passed, number))
    result = CliRunner().invoke(app, ["fuzz", "--record", str(path), "--cases", "9"])
    assert result.exit_code == 0
    assert "2 cases" in result.output
    assert json.loads(path.read_text())["cases"] == 2
    assert signal.getsignal(number) is before


KILLED = """
import os, signal
from swat_flex.testing.fuzz import Plan
from swat_flex.testing.workers import Search

if __name__ == "__main__":
    with Search(Plan(("naive",), "cpu", None, 0), 60.0, 1) as messages:
        for message in messages:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_worker_ends_with_a_killed_search(tmp_path):
    """It holds the output open, for which `run` waits: killed once the worker is warm and waits to be told to go."""
    (tmp_path / "killed.py").write_text(KILLED)
    killed = [sys.executable, tmp_path / "killed.py"]
    ended = subprocess.run(killed, check=False, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_every_run_has_a_seed_of_its_own_unless_one_is_given(monkeypatch):
    monkeypatch.setattr(command, "Search", _Staged())
    first, second, given = (CliRunner().invoke(app, ["fuzz", *more]).output for more in ([], [], ["--seed", "5"]))
    seeds = [output.split("seed ")[1].split(",")[0] for output in (first, second, given)]
    assert seeds[0] != seeds[1]
    assert seeds[2] == "5"


def test_a_campaign_goes_on_with_new_seeds_until_it_has_its_cases(tmp_path, monkeypatch):
    passed = [Passed("banded", "float32", Verdict(0.5, "dq", 0.1)), Passed("banded", "float32", Verdict(excluded=True))]
    passed += [Passed("cpp decode", "float16", Verdict(0.75, "out", 0.2))]
    monkeypatch.setattr(command, "Search", _Staged(*passed))
    path = tmp_path / "record.json"
    for cases, runs in ((3, 2), (5, 3)):  # of two cases each
        result = CliRunner().invoke(app, ["fuzz", "--record", str(path), "--cases", str(cases)])
        assert result.exit_code == 0, result.output
        record = json.loads(path.read_text())
        assert (record["cases"], record["seeds"], len(record["runs"])) == (2 * runs, runs, runs)
    assert (record["use"], record["trend"], record["failures"]) == (0.75, 0.2, 0)
    assert record["counts"]["banded float32"] == {"cases": 3, "excluded": 3, "use": 0.5, "of": "dq", "trend": 0.1}
    assert [x.name for x in tmp_path.iterdir()] == ["record.json"]


def test_a_campaign_records_its_failure_and_ends(tmp_path, monkeypatch):
    failure = Failure(SwatCase(2, 1), "banded", "cpu", "out: wrong")
    monkeypatch.setattr(command, "Search", _Staged(failure))
    arguments = ["--record", str(tmp_path / "r.json"), "--cases", "9", "--output", str(tmp_path / "f.json")]
    assert CliRunner().invoke(app, ["fuzz", *arguments]).exit_code == 1
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["failures"] == 1
    assert record["runs"][0]["failure"] == "out: wrong"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--cases", "5"], ["--cases", "--record", "5"]),
        (["--record", "pyproject.toml"], ["--record", "pyproject.toml"]),
        (["--backend", "fast"], ["--backend", "banded", "'fast'"]),
        (["--backend", "banded", "--dtype", "int8"], ["--dtype", "float32", "'int8'"]),
        (["--backend", "flex", "--dtype", "float64"], ["--dtype", "float32", "float64"]),
        (["--seconds", "0"], ["--seconds", "more than 0", "0"]),
        (["--output", "nowhere/file.json"], ["--output", "folder", "nowhere"]),
        (["--replay", "nowhere.json"], ["--replay", "nowhere.json"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, parts):
    result = CliRunner().invoke(app, ["fuzz", *arguments])
    assert result.exit_code == 2, result.output
    line = result.output.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line


def test_without_hypothesis_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["fuzz"])
    assert result.exit_code == 2
    assert "swat_flex[fuzz]" in result.output


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    for text in ("{}", "[]", "not json", '{"case": {"schema": 1}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected"):
            Failure.load(path)


def test_expanded_tensors_move_with_their_strides():
    case = dataclasses.replace(SwatCase(5, 2, kv_heads=3, batch=2), layouts=("expanded heads",) * 4)
    assert 0 in case.tensors()[0].stride()
    assert check(case, "banded").use < 1
