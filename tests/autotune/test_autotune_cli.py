import subprocess
import sys
from pathlib import Path

import pytest
from autotune_fakes import GPU, make_entry, make_key
from typer.testing import CliRunner

import autotune
from autotune import Entry, Failure, Store, Timing
from autotune.__main__ import app


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("AUTOTUNE_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "120")
    return Store(tmp_path / "store")


@pytest.fixture
def filled(store) -> Store:
    entry = make_entry(make_key(bucket={"size": 64, "causal": True}))
    failures = [({"name": "faster"}, Failure("crash", "exit code 3 [sorry]"))]
    timings = [*entry.timings, ({"name": "slow"}, Timing(3.0, 0.25, 2))]
    store.put(Entry(**{**vars(entry), "timings": timings, "failures": failures}))
    store.put(make_entry(make_key("softmax", device=GPU)))
    return store


def run(*arguments, answer=None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize("command", [["list"], ["show", "a"], ["export", "nowhere.json"], ["clear"]])
def test_an_empty_store_says_so(store, command):
    result = run(*command)
    assert result.exit_code == 0
    assert f"Nothing was measured yet: {store.folder} holds no entry" in result.output


def test_list(filled):
    output = run("list").output
    for text in ("matmul", "softmax", "size=64", "causal=True", "Fake GPU", "2.00x", "2 in "):
        assert text in output


def test_show_by_the_beginning_of_a_key(filled):
    digest = next(entry.key.digest for entry in filled.entries() if entry.failures)
    output = run("show", digest[:8]).output
    for text in (
        digest,
        "torch 2.12.0, triton 3.6.0",
        "2026-01-01 00:00 UTC by fake",
        "name=fast: 1.0000 ms",
        "+200.0%",
        "25.0%",
        "winner",
    ):
        assert text in output
    assert "crash: exit code 3 [sorry]" in output


@pytest.mark.parametrize(("key", "found"), [("", "2 entries"), ("xyz", "no entry")])
def test_show_needs_one_key(filled, key, found):
    result = run("show", key)
    assert result.exit_code == 1
    assert f"the beginning of {found}; see `list`" in result.output


def test_export_then_import_elsewhere(filled, tmp_path, monkeypatch):
    file = tmp_path / "all.json"
    assert f"Exported 2 entries to {file}." in run("export", file).output
    monkeypatch.setenv("AUTOTUNE_DIR", str(tmp_path / "other"))
    assert "2 added, 0 replaced, 0 kept" in run("import", file).output
    assert len(list(Store(tmp_path / "other").entries())) == 2


def test_export_and_import_say_what_to_do_about_a_bad_file(filled, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    assert "Write it with `python -m autotune export FILE`" in run("import", tmp_path / "bad.json").output
    assert "Name a file that" in run("import", tmp_path / "absent.json").output
    result = run("export", tmp_path / "bad.json" / "all.json")
    assert result.exit_code == 1
    assert "Name a file in a folder that you may write." in result.output


def test_import_that_cannot_save_fails(filled, tmp_path, monkeypatch):
    run("export", tmp_path / "all.json")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("AUTOTUNE_DIR", str(tmp_path / "file"))
    result = run("import", tmp_path / "all.json")
    assert result.exit_code == 1
    assert "2 entries could not be saved" in result.output


def test_clear_asks(filled):
    assert run("clear", answer="n\n").exit_code == 1
    assert len(list(filled.entries())) == 2
    assert "Deleted 2 entries." in run("clear", answer="y\n").output
    assert not list(filled.entries())


def test_clear_yes(filled):
    assert "Deleted 2 entries." in run("clear", "--yes").output


def test_a_torn_entry_is_one_line_of_warning(filled):
    torn = next(filled.folder.glob("matmul-*.json"))
    torn.write_text("{")
    result = run("list")
    assert result.exit_code == 0
    assert f"warning: {torn} was not used" in result.output
    assert "1 in " in result.output


def test_without_rich_the_command_names_what_brings_it():
    code = "import runpy, sys; sys.modules['rich.console'] = None; runpy.run_module('autotune', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: python -m autotune needs rich.console: pip install rich typer\n"


def test_as_a_module():
    folder = Path(autotune.__file__).parents[1]
    command = [sys.executable, "-m", "autotune", "--help"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    for name in ("list", "show", "export", "import", "clear"):
        assert name in done.stdout
