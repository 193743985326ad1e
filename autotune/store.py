"""Keep measurements across processes and machines: one JSON file per key, written whole."""

import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal

from autotune.device import Versions
from autotune.entry import FORMAT, Entry, Key, preferred
from autotune.files import patiently, write_whole
from autotune.space import Config, Space


class StoreWarning(UserWarning):
    """An entry could not be used, or the disk not be written; the call was answered without it."""


@dataclass(frozen=True)
class Found(Generic[Config]):
    """The configuration to use.

    Attributes:
        config: what to run with.
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
    """How many entries a merge added, replaced, kept because ours were preferred, and could not save."""

    added: int
    replaced: int
    kept: int
    unsaved: int


def open_store(app: str = "autotune", presets: Path | None = None) -> "Store":
    """Open the store in the folder AUTOTUNE_DIR, or else in the user's cache folder of `app`.

    Where neither AUTOTUNE_DIR nor platformdirs tells a folder, the store lives in memory, and one warning says so.

    Args:
        app: whose cache folder.
        presets: folder of files written by `Store.export_file`, shipped with a library; never written.
    """
    if chosen := os.environ.get("AUTOTUNE_DIR"):
        return Store(Path(chosen).expanduser(), presets)
    try:
        import platformdirs
    except ModuleNotFoundError:
        _warn(
            "platformdirs is not installed, so measurements are neither read from disk nor kept there: "
            "pip install platformdirs, or set AUTOTUNE_DIR to a folder"
        )
        return Store(None, presets)
    return Store(platformdirs.user_cache_path(app, appauthor=False) / "tuned", presets)


class Store:
    """Measurements in a folder, below them read-only presets, above them this process's memory.

    Any number of processes may read and write one folder. A file that is torn, foreign or outdated is a miss, told
    in one warning, and is moved aside, never deleted. A disk that cannot be written leaves the entry in memory, told
    in one warning. A process sees what others write only at its first look-up of a key.

    Args:
        folder: made when first written; None keeps measurements in this process alone.
        presets: see `open_store`.
    """

    def __init__(self, folder: Path | None, presets: Path | None = None) -> None:
        self.folder = folder
        self._presets_folder = presets
        self._presets: dict[str, list[Entry]] | None = None
        self._found: dict[Key, Found[Any]] = {}
        self._unsaved: dict[Key, Entry] = {}
        self._warned_of_disk = False

    @property
    def place(self) -> str:
        """Say where entries are kept."""
        return "this process's memory" if self.folder is None else str(self.folder)

    def lookup(self, key: Key, space: Space[Config]) -> Found[Config]:
        """The configuration to use for `key`: the user's own, else a preset's, else the default.

        Presets match on tunable, schema, bucket and device; source and versions may differ, and where several match
        the newest that `space` allows is taken. From the second call on this reads no file; it never writes one.

        Args:
            space: the tunable's only space; every configuration read is validated by it.
        """
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._find(key, space)
        return found

    def holds(self, tunable: str) -> bool:
        """Tell whether there may be any entry or preset of this tunable: one listing of the folder, no key to build."""
        if any(key.tunable == tunable for key in self._unsaved):
            return True
        if any(preset.key.tunable == tunable for presets in self._by_preset().values() for preset in presets):
            return True
        return bool(self._files(f"{_file_name(tunable)}-*.json"))

    def put(self, entry: Entry) -> bool:
        """Keep `entry` instead of any other with its key; whether it is on disk."""
        self._found.pop(entry.key, None)
        self._unsaved[entry.key] = entry
        if self.folder is None:
            return False
        try:
            # No newline ends the file: so every torn part of it is invalid JSON.
            write_whole(self.folder / _name_of(entry.key), json.dumps(entry.to_json(), indent=1))
        except OSError as error:
            self._warn_of_disk("written, so what was measured is kept for this process only", error)
            return False
        del self._unsaved[entry.key]
        return True

    def entries(self) -> Iterator[Entry]:
        """All of the user's entries, in the order of their file names, then those that could not be saved."""
        for path in self._files():
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
            ours = self._kept(theirs.key)
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
        write_whole(file, json.dumps({"format": FORMAT, "entries": [entry.to_json() for entry in entries]}, indent=1))
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
        paths = [] if self.folder is None else list(self.folder.glob("*.json"))
        for path in paths:
            path.unlink(missing_ok=True)
        deleted = len(paths) + len(self._unsaved)
        self._found.clear()
        self._unsaved.clear()
        return deleted

    def _find(self, key: Key, space: Space[Config]) -> Found[Config]:
        entry = self._kept(key, space)
        if entry is not None:
            return Found(space.parse(entry.winner), "user", entry)
        matching = self._by_preset().get(key.preset_digest, [])
        for preset in sorted(matching, key=lambda preset: preset.created, reverse=True):
            try:
                return Found(space.parse(preset.winner), "preset", preset)
            except ValueError as error:
                _warn(f"the preset for {key.tunable!r} was passed over: {error}")
        return Found(space.default, "default", None)

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

    def _files(self, pattern: str = "*.json") -> list[Path]:
        """The user's entries on disk, in the order of their names."""
        try:
            return [] if self.folder is None else sorted(self.folder.glob(pattern))
        except OSError as error:
            self._warn_of_disk("read", error)
            return []

    def _kept(self, key: Key, space: Space[Any] | None = None) -> Entry | None:
        """The user's own entry for `key`, if there is one that `space` allows."""
        if key in self._unsaved or self.folder is None:
            return self._unsaved.get(key)
        return self._read(self.folder / _name_of(key), space)

    def _read(self, path: Path, space: Space[Any] | None = None) -> Entry | None:
        """The entry in `path`; None if there is none, and after a warning if it is unusable."""
        try:
            content = patiently(path.read_bytes)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn_of_disk("read", error)
            return None
        try:
            entry = Entry.parse(json.loads(content))
            if _name_of(entry.key) != path.name:
                raise ValueError(f"its key belongs into {_name_of(entry.key)}")
            if space is not None:
                space.parse(entry.winner)
            return entry
        except (ValueError, RecursionError) as error:
            _move_aside(path, content, error)
            return None

    def _warn_of_disk(self, what: str, error: OSError) -> None:
        if not self._warned_of_disk:
            self._warned_of_disk = True
            _warn(f"{self.folder} cannot be {what}: {error}. Set AUTOTUNE_DIR to another folder to move it.")


def _name_of(key: Key) -> str:
    return f"{_file_name(key.tunable)}-{key.digest[:16]}.json"


def _file_name(tunable: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", tunable)[:60]


def read_export(file: Path) -> list[Entry]:
    """The entries of a file written by `Store.export_file`; raises OSError, or ValueError for another file."""
    try:
        data = json.loads(file.read_bytes())
        return [Entry.parse(entry) for entry in data["entries"]]
    except (KeyError, TypeError, RecursionError, ValueError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: expected a file that autotune exported, got {wrong}") from error


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
