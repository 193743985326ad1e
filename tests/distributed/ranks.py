"""Processes of a gloo group: start them, run one function on each, collect what they return."""

import contextlib
import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path

import programs
import torch
import torch.distributed as dist


def run(function, ranks, *arguments, timeout=60, seconds=300, may_die=False, fresh=False):
    """`[function(rank, *arguments)]` of every rank, in a group whose timeout is in seconds.

    A rank's exception comes back as its text, prefixed with its type; None stands for a rank that died (`may_die`).
    `fresh` ranks import everything under the environment of this moment.
    """
    context = multiprocessing.get_context("spawn") if fresh else programs.forking()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=_run, args=(function, rank, ranks, directory, timeout, may_die, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        assert not hung, f"ranks {hung} still ran after {seconds} s"
        files = [Path(directory, f"{rank}.pt") for rank in range(ranks)]
        assert may_die or all(file.exists() for file in files), "a rank died"
        return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _run(function, rank, ranks, directory, timeout, may_die, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    result = text_of(function, rank, *arguments)
    torch.save(result, Path(directory, f"{rank}.pt"))
    if may_die or isinstance(result, str):
        os._exit(0)  # a group that lost a rank waits for it when it is destroyed
    dist.barrier()
    dist.destroy_process_group()


def text_of(function, *arguments):
    """What a function returns, or the text of what it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


@contextlib.contextmanager
def traffic():
    """A list that receives, per batch of messages, (bytes of floats received, of ints received, of floats sent)."""
    batches, post = [], dist.batch_isend_irecv

    def counted(operations):
        counts = [0, 0, 0]
        for operation in operations:
            size = operation.tensor.numel() * operation.tensor.element_size()
            if operation.op is dist.isend:
                counts[2] += size * operation.tensor.is_floating_point()
            else:
                counts[0 if operation.tensor.is_floating_point() else 1] += size
        batches.append(tuple(counts))
        return post(operations)

    dist.batch_isend_irecv = counted
    try:
        yield batches
    finally:
        dist.batch_isend_irecv = post
