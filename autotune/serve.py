"""The inside of a worker process: build the task, then run candidates as asked."""

import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from autotune.runner import CandidateFailed, DeviceLost, LocalRunner


def serve(connection: Connection, factory: str, argument: object, log: Path) -> None:
    """Answer `(verb, config)` with `(status, value)` until the pipe closes.

    The first answer comes unasked: the name of the task's clock. Statuses: "done" with the result, "failed" with a
    Failure, "lost" with a reason when the device is gone, "mistake" with a traceback when the task is at fault.
    """
    _settle(log)
    try:
        module, _, name = factory.partition(":")
        runner: LocalRunner[Any] = LocalRunner(getattr(importlib.import_module(module), name)(argument))
        connection.send(("done", runner.clock))
    except Exception:
        connection.send(("mistake", traceback.format_exc()))
        return
    verbs = {"compile": lambda config: runner.compile([config]), "admit": runner.admit, "sample": runner.sample}
    while True:
        try:
            verb, config = connection.recv()
        except EOFError:
            return  # the parent is gone
        try:
            answer: tuple[str, object] = ("done", verbs[verb](config))
        except CandidateFailed as failed:
            answer = ("failed", failed.failure)
        except DeviceLost as lost:
            answer = ("lost", str(lost))
        except Exception:
            answer = ("mistake", traceback.format_exc())
        connection.send(answer)


def _settle(log: Path) -> None:
    """Write output to `log`, leave Ctrl-C to the parent, and end with the parent even from within a hang."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        os.setsid()  # a group of its own, to be killed with all it started
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # mypy: spawned processes have one
    parent.join()
    if sys.platform != "win32":
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
