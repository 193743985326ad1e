"""What `make transformers-suite` makes of outcomes."""

import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent / "suite"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(SUITE))
    import run

    yield run
    for name in ("run", "expected"):
        sys.modules.pop(name)


def test_a_new_failure_and_a_gone_one_are_told(run):
    found = {"A.one": "failed", "A.two": "failed", "A.three": "passed", "A.four": "passed", "A.five": "skipped"}
    reasons = dict.fromkeys(["A.two", "A.four", "A.five", "A.six"], "because")
    assert run.compare(found, reasons) == (["A.one"], ["A.four"])


def test_every_expected_failure_has_a_reason_and_a_line_in_the_docs(run):
    docs = (SUITE.parents[2] / "docs/transformers.md").read_text()
    for name, reason in run.expected().items():
        assert reason, name
        assert f"`{name.split('.')[1]}`" in docs, name


def test_a_failed_part_fails_its_test(run):
    class Report:
        def __init__(self, **fields):
            self.nodeid, self.failed, self.skipped, self.when = "models.py::A::test_b[x]", False, False, "call"
            self.__dict__.update(fields)

    outcomes = run.Outcomes()
    outcomes.pytest_runtest_logreport(Report(failed=True))
    outcomes.pytest_runtest_logreport(Report())
    assert outcomes.found == {"A.test_b": "failed"}


def test_what_the_distribution_lacks_is_said_and_replaced(run, tmp_path):
    (tmp_path / "tests").mkdir()
    assert run.complete(tmp_path / "tests", None) == list(run.MISSING)
    assert "class GenerationTesterMixin" in (tmp_path / "tests/generation/test_utils.py").read_text()
    source = tmp_path / "source"
    for name in run.MISSING:
        (source / "tests" / name).parent.mkdir(parents=True)
        (source / "tests" / name).write_text("theirs")
    (tmp_path / "other").mkdir()
    assert run.complete(tmp_path / "other", source) == []
    assert (tmp_path / "other/generation/test_utils.py").read_text() == "theirs"
