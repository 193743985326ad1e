"""Build the kernels on first use, keep the library in the user's cache, and never load what this user did not build.

A library is kept under a name made of everything that decides what the compiler makes: sources, compiler and its
version, flags, CPU. Its last 32 bytes are a digest of the rest and of that name, so that one truncated, damaged or
copied from elsewhere is built again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "kernels"
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"),
    *("-shared", "-fPIC", "-pthread", "-fvisibility=default"),
)
DIGEST = hashlib.sha256().digest_size
PATIENCE = 300.0  # seconds that a compiler may take


class BuildError(RuntimeError):
    """No library: the message says why in one line."""


@dataclass(frozen=True, slots=True)
class Built:
    """A loaded library, and how it came about: the compiler's first line, seconds of building (0: it was kept)."""

    library: ctypes.CDLL
    compiler: str
    seconds: float


def build(folder: Path | None = None, flags: tuple[str, ...] = FLAGS) -> Built:
    """Load the library, from the cache or the compiler.

    Args:
        folder: where libraries are kept; the user's cache by default. Without platformdirs, which knows the cache, or
            where the folder does not belong to the user or others may write to it, a private temporary folder of this
            process takes its place, and each process builds anew.
        flags: of the compiler.

    Raises:
        BuildError: no compiler, or one that fails; with its first error.
    """
    compiler = _compiler()
    version = _first_line(_run([compiler, "--version"]).stdout)
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir())]
    name = _digest(*sources, compiler.encode(), version.encode(), " ".join(flags).encode(), _cpu().encode()).hex()[:24]
    with _private(folder or _cache_folder()) as home:
        path = home / f"{name}.so"
        if _is_whole(path, name):
            return Built(ctypes.CDLL(str(path)), version, 0.0)
        begin = time.monotonic()
        with _only_one(home / f"{name}.lock"):
            if not _is_whole(path, name):  # else another process built it in the meantime
                _compile(compiler, flags, path, name)
        return Built(ctypes.CDLL(str(path)), version, time.monotonic() - begin)


def _compile(compiler: str, flags: tuple[str, ...], path: Path, name: str) -> None:
    """Compile beside the final place and move the whole library there."""
    handle, temporary = tempfile.mkstemp(suffix=".part", dir=path.parent)
    try:
        os.close(handle)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor() as pool:
            sources = sorted(SOURCES.glob("*.cpp"))
            objects = [f"{folder}/{source.stem}.o" for source in sources]
            commands = [[compiler, *flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
            for done in [*pool.map(_run, commands), _run([compiler, *flags, *objects, "-o", temporary])]:
                if done.returncode != 0:
                    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
                    raise BuildError(f"{compiler} failed: {_first_line(errors[0] if errors else done.stderr)}")
        with open(temporary, "r+b") as file:
            digest = _digest(name.encode(), file.read())
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _compiler() -> str:
    """Find the compiler that torch.compile would use."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise BuildError(f"no C++ compiler: {' and '.join(wanted)} not found")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error


@functools.cache
def _cpu() -> str:
    """Read what -march=native looks at."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({x for x in lines if x.startswith(("flags", "Features", "model name", "CPU part"))}))
    return f"{platform.machine()} {platform.processor()}"


def _cache_folder() -> Path | None:
    """Return the folder in the user's cache; None without platformdirs, which a call must not need."""
    try:
        from platformdirs import user_cache_path
    except ModuleNotFoundError:
        return None
    return user_cache_path("swat_flex") / "kernels"


@contextlib.contextmanager
def _private(folder: Path | None) -> Iterator[Path]:
    """Give the folder if it is the user's alone, else a temporary one, which the loaded library outlives."""
    if folder is not None and _is_private(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="swat_flex-") as temporary:
        yield Path(temporary)


def _is_private(folder: Path) -> bool:
    """Tell whether a folder, made where it is missing, belongs to the user and nobody else may write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = folder.lstat()
    except OSError:
        return False
    own = stat.S_ISDIR(known.st_mode) and known.st_uid == os.geteuid() and not known.st_mode & 0o022
    return own and os.access(folder, os.W_OK)


def _is_whole(path: Path, name: str) -> bool:
    """Tell whether this is the user's own file and as it was written."""
    try:
        with open(path, "rb") as file:
            known = os.fstat(file.fileno())
            content = file.read()
    except OSError:
        return False
    own = stat.S_ISREG(known.st_mode) and known.st_uid == os.geteuid() and not known.st_mode & 0o022
    return own and content[-DIGEST:] == _digest(name.encode(), content[:-DIGEST])


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Make other processes that build the same library wait here; a lock dies with its process."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(*parts: bytes) -> bytes:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.digest()


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
