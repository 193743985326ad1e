"""Write a file whole: whoever reads it, even after a power cut, finds the old content or the new one."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Seconds to wait for another process: Windows lets nobody replace a file that is read, nor read one being replaced.
PAUSES = (0.01, 0.05, 0.2, 1.0) if os.name == "nt" else ()


def write_whole(path: Path, content: str | bytes | Callable[[Any], object]) -> None:
    """Replace `path`: write a temporary file beside it, synchronise it, rename it, synchronise the folder.

    Args:
        path: the file; its folder is made where it is missing.
        content: text, written as UTF-8, or bytes, or a function that writes into the binary file it is given.

    Raises:
        OSError: the disk cannot be written; then `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        patiently(lambda: os.replace(temporary, path))
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    synchronise_folder(path.parent)


def synchronise_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can: Windows cannot, nor can all file systems."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            number = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)


def patiently(step: Callable[[], T]) -> T:
    """Call `step`, on Windows again and again while another process holds its file."""
    for pause in PAUSES:
        try:
            return step()
        except PermissionError:
            time.sleep(pause)
    return step()
