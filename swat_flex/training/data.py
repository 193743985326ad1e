"""Text as tokens: any folder of files, a token per byte, documents packed, files kept apart for evaluation."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SEPARATOR = 256  # stands before every document
VOCAB = 264  # 256 bytes, the separator, and up to a multiple of 8, which tensor cores want
HELD_OUT = 0.05  # share of the files
SKIPPED = ("__pycache__", "node_modules", "site-packages", "dist-packages")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Two packed streams of documents, uint8 `[N]`; a 0 stands before each document and is read as SEPARATOR.

    fingerprint changes with any byte, name or file; folder and pattern are what `read_corpus` was given.
    """

    train: Tensor
    held_out: Tensor
    documents: int
    fingerprint: str
    folder: str | None
    pattern: str


class Batch(NamedTuple):
    """Rows to train on: tokens int64 `[B, L]`, targets int64 `[B, L]` (the token that follows), document_ids int32
    `[B, L]`."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in self))


def read_corpus(folder: Path | None = None, pattern: str = "*") -> Corpus:
    """Read every text file below a folder, or one file; None is Python's standard library without its tests.

    Text is UTF-8 without NUL bytes; hidden files and folders, caches and installed packages are left out. A file is
    held out when the hash of its path below the folder falls under HELD_OUT: the same files on every machine; at least
    one, never all. A lone file is held out from 95% of its bytes on.

    Args:
        folder: in memory its files take a byte per byte.
        pattern: file names to take, as a shell has them: "*.py".

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no text in it.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    skipped = SKIPPED if folder is not None else (*SKIPPED, "test", "tests", "idle_test")
    if not root.exists():
        raise FileNotFoundError(f"folder: expected a folder or a file of text, got {str(root)!r}, which does not exist")
    documents = dict(_texts(root, "*.py" if folder is None else pattern, skipped))
    if not documents:
        raise ValueError(f"folder: expected files of UTF-8 text named {pattern!r}, got none below {str(root)!r}")
    digest = hashlib.sha256()
    for name, text in documents.items():
        digest.update(f"{len(name)} {len(text)} {name}".encode() + text)
    train, held_out = _split(documents)
    given = None if folder is None else str(folder)
    return Corpus(_pack(train), _pack(held_out), len(documents), digest.hexdigest(), given, pattern)


def _texts(root: Path, pattern: str, skipped: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield (path below root, contents) of every text, in the order of their paths."""
    paths = [root] if root.is_file() else sorted(root.rglob(pattern), key=lambda path: path.as_posix())
    for path in paths:
        parts = path.relative_to(root).parts or (path.name,)
        if not path.is_file() or any(part.startswith(".") or part in skipped for part in parts):
            continue
        text = path.read_bytes()
        if text and b"\0" not in text and _is_utf8(text):
            yield "/".join(parts), text


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split(documents: dict[str, bytes]) -> tuple[list[bytes], list[bytes]]:
    """Split documents into those to train on and those held out."""
    if len(documents) == 1:
        (text,) = documents.values()
        cut = max(1, int(len(text) * (1 - HELD_OUT)))
        return [text[:cut]], [text[cut:]]
    by_hash = sorted(documents, key=_share)
    count = min(max(1, sum(_share(name) < HELD_OUT for name in documents)), len(documents) - 1)
    kept = set(by_hash[:count])
    return [documents[n] for n in documents if n not in kept], [documents[n] for n in documents if n in kept]


def _share(name: str) -> float:
    """Hash a name to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _pack(documents: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"\0".join([b"", *documents])), dtype=torch.uint8)


def rows(stream: Tensor, starts: list[int], length: int) -> Batch:
    """Rows of `length` tokens from these places of a packed stream; documents are numbered within a row."""
    taken = torch.stack([stream[start : start + length + 1] for start in starts]).long()
    taken = torch.where(taken == 0, SEPARATOR, taken)
    tokens, targets = taken[:, :-1].contiguous(), taken[:, 1:].contiguous()
    return Batch(tokens, targets, (tokens == SEPARATOR).cumsum(1, dtype=torch.int32))


class Sampler:
    """Random rows of the stream. Step n draws from (seed, n) alone, so there is no state to save.

    Several ranks draw the same batch and each takes its share.

    Args:
        stream: of a `Corpus`.
        length: tokens of a row.
        batch: rows of all ranks together, a multiple of ranks.
        seed: any int.
    """

    def __init__(self, stream: Tensor, length: int, batch: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        if len(stream) < length + 1:
            raise ValueError(f"length: expected fewer tokens than the training text has, {len(stream)}, got {length}")
        if batch < 1 or batch % ranks:
            raise ValueError(f"batch: expected a positive multiple of the {ranks} ranks, got {batch}")
        self.stream, self.length, self.batch, self.seed = stream, length, batch, seed
        self.mine = slice(rank, None, ranks)

    def __call__(self, step: int) -> Batch:
        """The rows of one step."""
        number = hashlib.sha256(f"{self.seed} {step}".encode()).digest()[:4]  # the generator reads 32 bits of a seed
        draw = torch.Generator().manual_seed(int.from_bytes(number, "big"))
        starts = torch.randint(len(self.stream) - self.length, (self.batch,), generator=draw).tolist()
        return rows(self.stream, starts[self.mine], self.length)
