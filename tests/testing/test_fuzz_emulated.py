"""`swat-flex fuzz --emulate`: a fault planted in compiled code is found, shrunk, written and replayed."""

import re
from types import SimpleNamespace
from unittest import mock

import pytest
from typer.testing import CliRunner

pytest.importorskip("hypothesis")
pytest.importorskip("triton")
pytest.importorskip("numpy")

from swat_flex.cli import app
from swat_flex.inspection import launches
from swat_flex.testing import fuzz
from swat_flex.testing.fuzz import Failure, Plan

compile_launch = launches.compile_launch


def harmed(kernel, target, arguments, **options):
    """The compiled kernel with its rows' last bound moved: every comparison "less than" is "at most"."""
    found = compile_launch(kernel, target, arguments, **options)
    text = re.sub(r"setp\.lt\.s32", "setp.le.s32", found.asm["ptx"])
    return SimpleNamespace(asm={"ptx": text}, metadata=found.metadata, src=found.src)


@pytest.mark.slow
def test_a_fault_in_compiled_code_is_found_shrunk_and_replayed(tmp_path):
    with mock.patch.object(launches, "compile_launch", harmed):
        failure = fuzz.search(Plan(("triton",), emulate="sm_80"), lambda *_: None, lambda: False)
        assert failure is not None
        print(failure.case, failure.text)
        assert failure.case.length <= 16
        path = tmp_path / "failure.json"
        failure.save(path)
        assert Failure.load(path) == failure
        assert fuzz.replay(failure) is not None
    assert fuzz.replay(failure) is None
    assert "with emulated('sm_80')" in failure.reproducer()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--emulate", "sm_70"], "sm_70"), (["--emulate", "sm_80", "--backend", "banded"], "whose code is emulated")],
)
def test_what_cannot_be_emulated_is_refused(arguments, message):
    result = CliRunner().invoke(app, ["fuzz", *arguments])
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", "", result.output))
