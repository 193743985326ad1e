import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from autotune_fakes import Choice, Script, choices

import autotune
from autotune import TaskError, WorkerRunner, search

pytestmark = pytest.mark.xdist_group("processes")

posix = pytest.mark.skipif(os.name != "posix", reason="signals and process groups")


@contextlib.contextmanager
def workers(workers=1, timeout=60.0, **scripts):
    before = set(multiprocessing.active_children())
    with WorkerRunner("autotune_fakes:FakeTask", scripts, workers=workers, timeout=timeout) as runner:
        yield runner
    assert set(multiprocessing.active_children()) <= before


def importable():
    """An environment in which the fakes and autotune can be imported."""
    folders = [Path(__file__).parent, Path(autotune.__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}


def is_running(pid):
    """Whether a process, of whatever parent, is more than a zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip()[:1] not in ("", "Z")


def wait_until(fact):
    for _ in range(600):
        if fact():
            return
        time.sleep(0.05)
    pytest.fail(f"not within 30 s: {fact}")


@pytest.mark.parametrize("count", [1, 2])
def test_misbehaviour_costs_one_candidate_each(count):
    scripts = {
        "default": Script((4.0,)),
        "wrong": Script((0.1,), does="wrong"),
        "raises": Script((0.1,), does="raise"),
        "spills": Script((0.1,), does="reject", at="compile"),
        "exits": Script((0.1,), does="exit"),
        "breaks the compiler": Script((0.1,), does="exit", at="compile"),
        "poisons": Script((0.1,), does="lose", at="sample"),
        "noisy": Script((0.5, 2.5, 2.6)),
        "fast": Script((1.0,)),
    }
    with workers(count, **scripts) as runner:
        result = search(choices(*scripts), runner)
    assert result.winner == Choice("fast")
    assert result.speedup == 4.0
    assert {config.name: failure.kind for config, failure in result.failures.items()} == {
        "wrong": "wrong",
        "raises": "error",
        "spills": "rejected",
        "exits": "crash",
        "breaks the compiler": "crash",
        "poisons": "crash",
    }
    reason = "the process ended with exit code 3; last output: terribly sorry"
    assert result.failures[Choice("exits")].reason == reason
    assert "illegal memory access" in result.failures[Choice("poisons")].reason


def test_a_hang_costs_one_candidate():
    scripts = {"default": Script((4.0,)), "hangs": Script(does="hang"), "fast": Script((1.0,))}
    with workers(timeout=1.0, **scripts) as runner:
        result = search(choices(*scripts), runner)
    assert result.winner == Choice("fast")
    failure = result.failures[Choice("hangs")]
    assert (failure.kind, failure.reason) == ("timeout", "no answer within 1 s")


def test_a_compiler_that_hangs_costs_one_candidate_and_delays_no_other():
    scripts = {"a": Script(does="hang", at="compile"), "b": Script(), "c": Script(), "d": Script(does="raise")}
    with workers(2, timeout=1.5, **scripts) as runner:
        failures = runner.compile([Choice(name) for name in scripts])
    assert {config.name: failure.kind for config, failure in failures.items()} == {"a": "timeout"}


@posix
def test_a_killed_process_tells_its_signal():
    with workers(killed=Script(does="kill")) as runner:
        result = search(choices("killed"), runner)
    assert result.failures[Choice("killed")].reason == "the process ended with signal SIGKILL"


def test_a_crash_in_the_final_leaves_the_others_to_be_admitted_anew():
    scripts = {"default": Script((4.0,)), "bad": Script((0.1,), does="exit", at="sample", after=12), "fast": Script()}
    with workers(**scripts) as runner:
        result = search(choices(*scripts), runner)
    assert result.winner == Choice("fast")
    assert [failure.kind for failure in result.failures.values()] == ["crash"]
    assert result.timings[Choice("default")].rounds == result.timings[Choice("fast")].rounds == 15


@pytest.mark.parametrize("at", ["compile", "run", "sample"])
def test_a_programming_error_surfaces_with_its_traceback(at):
    with workers(typo=Script(does="err", at=at)) as runner, pytest.raises(TaskError, match="'warsp' is not defined"):
        search(choices("typo"), runner)


def test_a_task_that_cannot_be_built_surfaces():
    with WorkerRunner("autotune_fakes:broken_factory", 7) as runner, pytest.raises(TaskError, match="no task for 7"):
        search(choices("any"), runner)
    with WorkerRunner("autotune_fakes:absent") as runner, pytest.raises(TaskError, match="absent"):
        search(choices("any"), runner)
    assert not multiprocessing.active_children()


def test_construction_refuses_and_a_closed_runner_says_so():
    with pytest.raises(ValueError, match="factory: expected 'module:function'"):
        WorkerRunner("autotune_fakes.FakeTask")
    with pytest.raises(ValueError, match="workers: expected a number above 0, got 0"):
        WorkerRunner("autotune_fakes:FakeTask", workers=0)
    with workers() as runner:
        pass
    with pytest.raises(ValueError, match="expected an open one"):
        runner.admit(Choice("any"))


@posix
def test_ctrl_c_during_a_hang_keeps_what_was_measured(tmp_path):
    hanging = tmp_path / "hanging"
    scripts = {"default": Script((4.0,)), "fast": Script((1.0,)), "hangs": Script(does="hang", file=hanging)}

    def interrupt():
        wait_until(hanging.exists)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with workers(**scripts) as runner:
        thread.start()
        result = search(choices(*scripts), runner)
        thread.join()
        assert runner.admit(Choice("fast")) == 1.0  # a new worker took over
    assert result.interrupted
    assert result.winner == Choice("fast")
    assert not is_running(hanging.read_text())


@posix
def test_what_a_candidate_started_ends_with_it(tmp_path):
    child = tmp_path / "child"
    with workers(timeout=2.0, parent=Script(does="hang with child", file=child)) as runner:
        result = search(choices("parent"), runner)
    assert result.failures[Choice("parent")].kind == "timeout"
    wait_until(lambda: not is_running(child.read_text()))


@posix
def test_a_hanging_worker_ends_when_its_parent_is_killed(tmp_path):
    hanging = tmp_path / "hanging"
    code = (
        "from pathlib import Path; from autotune_fakes import *; from autotune import *\n"
        f"scripts = {{'hangs': Script(does='hang', file=Path({str(hanging)!r}))}}\n"
        "WorkerRunner('autotune_fakes:FakeTask', scripts).admit(Choice('hangs'))\n"
    )
    # What a killed parent leaves behind goes with the test's own folder.
    parent = subprocess.Popen([sys.executable, "-c", code], env={**importable(), "TMPDIR": str(tmp_path)})
    wait_until(lambda: hanging.exists() and hanging.read_text())
    assert is_running(hanging.read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(hanging.read_text()))


def test_an_unclosed_runner_does_not_keep_its_script_from_ending(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from autotune_fakes import *; from autotune import *\n"
        "if __name__ == '__main__':\n"
        "    runner = WorkerRunner('autotune_fakes:FakeTask', {'a': Script()})\n"
        "    print(runner.admit(Choice('a')))\n"
    )
    command = [sys.executable, script]
    done = subprocess.run(command, env=importable(), capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "1.0\n"
