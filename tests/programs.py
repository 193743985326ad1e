"""Run a program as `python FILE` does, in a process that has torch already: a server imports it once and forks."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

PRELOADED = ["torch", "torch.distributed", "swat_flex.distributed"]


def forking():
    """The context of processes that are forked from the server, before it has any threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run(path, folder):
    """Run the file with `folder` as its working directory; an AssertionError tells what it wrote before it failed."""
    written = Path(folder) / "written"
    process = forking().Process(target=_program, args=(str(path), str(folder), str(written)))
    process.start()
    process.join()
    assert process.exitcode == 0, written.read_text()[-6000:]


def _program(path, folder, written):
    with open(written, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")
