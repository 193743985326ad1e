"""A small corpus and a small run."""

from pathlib import Path

import pytest

from swat_flex.training import Corpus, read_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty documents of a few kilobytes."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text("".join(f"line {j} of document {i}\n" for j in range(20 + 7 * i)))
    return texts


@pytest.fixture
def corpus(folder: Path) -> Corpus:
    return read_corpus(folder)
