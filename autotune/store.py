"""Keep measurements across processes and machines: one JSON file per key, written atomically."""

import contextlib
import json
import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import platformdirs

from autotune.device import Versions
from autotune.entry import FORMAT, Entry, Key, preferred
from autotune.space import Config, Space

T = TypeVar("T")

# Seconds to wait for another process: Windows lets nobody replace a file that is read, nor read one being replaced.
PAUSES = (0.01, 0.05, 0.2, 1.0) if os.name == "nt" else ()


class StoreWarning(UserWarning):
    """An entry could not be used, or the disk not be written; the call was answered without it."""


@dataclass(frozen=True)
class Found(Generic[Config]):
    """The configuration to use.

    Attributes:
        config: it.
        origin: "user" for this machine's own measurement, "preset" for a shipped one, "default" for neither.
        entry: the measurement behind it; None for the default.
    """

    config: Config
    origin: Literal["user", "preset", "default"]
    entry: Entry | None

    @property
    def versions(self) -> Versions | None:
        """What it was measured with; a preset's may differ from those installed."""
        return self.entry.key.versions if self.entry else None


@dataclass(frozen=True)
class Merged:
    """How many entries a merge added, replaced, left as they were because ours were preferred, and could not save."""

    added: int
    replaced: int
    kept: int
    unsaved: int


def open_store(app: str = "autotune", presets: Path | None = None) -> "Store":
    """The store in the folder AUTOTUNE_DIR, or else in the user's cache folder of `app`.

    Args:
        app: whose cache folder.
        presets: folder of files written by `Store.export_file`, shipped with a library; never written.
    """
    chosen = os.environ.get("AUTOTUNE_DIR")
    folder = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path(app, appauthor=False) / "tuned"
    return Store(folder, presets)


class Store:
    """Measurements in a folder, below them read-only presets, above them this process's memory.

    Any number of processes may read and write one folder. A file that is torn, foreign or outdated is a miss, told
    in one warning, and is moved aside, never deleted. A disk that cannot be written leaves the entry in memory, told
    in one warning. A process sees what others write only at its first look-up of a key.

    Args:
        folder: made when first written.
        presets: see `open_store`.
    """

    def __init__(self, folder: Path, presets: Path | None = None) -> None:
        self.folder = folder
        self._presets_folder = presets
        self._presets: dict[str, list[Entry]] | None = None
        self._found: dict[Key, Found[Any]] = {}
        self._unsaved: dict[Key, Entry] = {}
        self._warned_of_disk = False

    def lookup(self, key: Key, space: Space[Config]) -> Found[Config]:
        """The configuration to use for `key`: the user's own, else a preset's, else the default.

        Presets match on tunable, schema, bucket and device; source and versions may differ, and where several match
        the newest that `space` allows is taken. From the second call on this reads no file; it never writes one.

        Args:
            key: the problem.
            space: the tunable's only space; every configuration read is validated by it.
        """
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._find(key, space)
        return found

    def holds(self, tunable: str) -> bool:
        """Whether there may be any entry or preset of this tunable: one listing of the folder, and no key to build."""
        if any(key.tunable == tunable for key in self._unsaved):
            return True
        if any(preset.key.tunable == tunable for presets in self._by_preset().values() for preset in presets):
            return True
        try:
            return any(self.folder.glob(f"{_file_name(tunable)}-*.json"))
        except OSError as error:
            self._warn_of_disk("read", error)
            return False

    def put(self, entry: Entry) -> bool:
        """Keep `entry` instead of any other with its key; whether it is on disk."""
        self._found.pop(entry.key, None)
        try:
            _write(self._path(entry.key), json.dumps(entry.to_json(), indent=1))
        except OSError as error:
            self._unsaved[entry.key] = entry
            self._warn_of_disk("written, so what was measured is kept for this process only", error)
            return False
        self._unsaved.pop(entry.key, None)
        return True

    def entries(self) -> Iterator[Entry]:
        """All of the user's entries, in the order of their file names, then those that could not be saved."""
        try:
            paths = sorted(self.folder.glob("*.json"))
        except OSError as error:
            self._warn_of_disk("read", error)
            paths = []
        for path in paths:
            entry = self._read(path)
            if entry is not None:
                yield entry
        yield from self._unsaved.values()

    def merge(self, entries: Iterable[Entry]) -> Merged:
        """Take entries measured elsewhere.

        Where a key is in both, the entry with the lower winner's time is kept if one clock timed both, else the
        newer one: times of different clocks do not compare.
        """
        added = replaced = kept = unsaved = 0
        for theirs in entries:
            ours = self._unsaved.get(theirs.key) or self._read(self._path(theirs.key))
            if ours is not None and preferred(ours, theirs) is ours:
                kept += 1
                continue
            added += ours is None
            replaced += ours is not None
            unsaved += not self.put(theirs)
        return Merged(added, replaced, kept, unsaved)

    def export_file(self, file: Path) -> int:
        """Write all entries to one file, for another machine or as presets; how many. Raises OSError."""
        entries = list(self.entries())
        _write(file, json.dumps({"format": FORMAT, "entries": [entry.to_json() for entry in entries]}, indent=1))
        return len(entries)

    def import_file(self, file: Path) -> Merged:
        """Merge the entries of a file written by `export_file`.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not such a file; nothing is merged.
        """
        return self.merge(read_export(file))

    def clear(self) -> int:
        """Delete all entries; how many. Files that were moved aside stay. Raises OSError."""
        paths = list(self.folder.glob("*.json"))
        for path in paths:
            path.unlink(missing_ok=True)
        self._found.clear()
        self._unsaved.clear()
        return len(paths)

    def _find(self, key: Key, space: Space[Config]) -> Found[Config]:
        entry = self._unsaved.get(key) or self._read(self._path(key), space)
        if entry is not None:
            return Found(space.parse(entry.winner), "user", entry)
        for preset in self._matching_presets(key):
            try:
                return Found(space.parse(preset.winner), "preset", preset)
            except ValueError as error:
                _warn(f"the preset for {key.tunable!r} was passed over: {error}")
        return Found(space.default, "default", None)

    def _matching_presets(self, key: Key) -> list[Entry]:
        """Presets for `key`, the newest first."""
        matching = self._by_preset().get(key.preset_digest, [])
        return sorted(matching, key=lambda entry: entry.created, reverse=True)

    def _by_preset(self) -> dict[str, list[Entry]]:
        """All presets, by what they match; read once."""
        if self._presets is None:
            self._presets = {}
            for file in sorted(self._presets_folder.glob("*.json")) if self._presets_folder else []:
                try:
                    for entry in read_export(file):
                        self._presets.setdefault(entry.key.preset_digest, []).append(entry)
                except (OSError, ValueError) as error:
                    _warn(f"the presets in {file} were passed over: {error}")
        return self._presets

    def _read(self, path: Path, space: Space[Any] | None = None) -> Entry | None:
        """The entry in `path`; None if there is none, and after a warning if it is unusable."""
        try:
            content = _patiently(path.read_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn_of_disk("read", error)
            return None
        try:
            entry = Entry.parse(json.loads(content))
            if self._path(entry.key) != path:
                raise ValueError(f"its key belongs into {self._path(entry.key).name}")
            if space is not None:
                space.parse(entry.winner)
            return entry
        except (ValueError, RecursionError) as error:
            _move_aside(path, content, error)
            return None

    def _path(self, key: Key) -> Path:
        return self.folder / f"{_file_name(key.tunable)}-{key.digest[:16]}.json"

    def _warn_of_disk(self, what: str, error: OSError) -> None:
        if not self._warned_of_disk:
            self._warned_of_disk = True
            _warn(f"{self.folder} cannot be {what}: {error}. Set AUTOTUNE_DIR to another folder to move it.")


def _file_name(tunable: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", tunable)[:60]


def read_export(file: Path) -> list[Entry]:
    """The entries of a file written by `Store.export_file`; raises OSError, or ValueError for another file."""
    try:
        data = json.loads(file.read_bytes())
        return [Entry.parse(entry) for entry in data["entries"]]
    except (KeyError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"{file} must be a file that autotune exported: {type(error).__name__}: {error}") from error


def _write(path: Path, text: str) -> None:
    """Replace `path` at once and for good: a reader, or a power cut, sees the old content or the new one.

    No newline ends the file: so every torn part of it is invalid JSON.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _patiently(lambda: os.replace(temporary, path))
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # Windows opens no folders
        with contextlib.suppress(OSError):  # nor do all file systems sync them
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _patiently(step: Callable[[], T]) -> T:
    for pause in PAUSES:
        try:
            return step()
        except PermissionError:
            time.sleep(pause)
    return step()


def _move_aside(path: Path, content: bytes, error: Exception) -> None:
    """Rename an unusable entry, so that it is kept but read no more."""
    aside = path.with_name(f"{path.name}.{time.time_ns()}.aside")
    try:
        os.replace(path, aside)
        if aside.read_bytes() != content:  # another process was just writing a good one
            os.replace(aside, path)
            return
        _warn(f"{path} was not used and is now {aside.name}: {error}")
    except FileNotFoundError:
        pass  # another process moved it
    except OSError as refused:
        _warn(f"{path} was not used: {error}. It could not be moved aside: {refused}")


def _warn(text: str) -> None:
    warnings.warn(text, StoreWarning, stacklevel=2)
