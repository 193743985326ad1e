"""Runs in processes of their own, a thread each, so that none waits for another's."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from perf.quality.experiment import Run, Size, train_and_read
from swat_flex.training import Corpus, read_corpus


def train_all(missing: list[tuple[str, int]], size: Size, jobs: int, device: torch.device) -> Iterator[Run]:
    """The runs as they end, in processes of their own."""
    spawn = multiprocessing.get_context("spawn")
    threads = 1 if device.type == "cpu" else os.cpu_count() or 1
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare, initargs=(threads,)) as pool:
        futures = [pool.submit(_run, name, size, seed, device.type) for name, seed in missing]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_corpus: Corpus | None = None


def _prepare(threads: int) -> None:
    global _corpus  # noqa: PLW0603  # once per process
    torch.set_num_threads(threads)
    _corpus = read_corpus()


def _run(variant: str, size: Size, seed: int, device: str) -> Run:
    assert _corpus is not None  # _prepare ran first
    return train_and_read(variant, size, seed, _corpus, torch.device(device))
