"""Runs in processes of their own, a thread each, so that none waits for another's."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from perf.quality.experiment import Run, Size, Text, train_and_read

Task = tuple[str, float, int]  # kind, learning rate, seed


def train_all(missing: list[Task], size: Size, text: str, jobs: int, device: torch.device) -> Iterator[Run]:
    """The runs as they end, in processes of their own."""
    spawn = multiprocessing.get_context("spawn")
    threads = 1 if device.type == "cpu" else os.cpu_count() or 1
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare, initargs=(threads, text)) as pool:
        futures = [pool.submit(_run, *task, size, device.type) for task in missing]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_text: Text | None = None


def _prepare(threads: int, text: str) -> None:
    global _text  # noqa: PLW0603  # once per process
    torch.set_num_threads(threads)
    _text = Text.of(text)


def _run(variant: str, rate: float, seed: int, size: Size, device: str) -> Run:
    assert _text is not None  # _prepare ran first
    return train_and_read(variant, rate, seed, size, _text, torch.device(device))
