"""The look-up of what was measured fastest for a problem; it never tunes, compiles or writes.

A problem's bucket is looked for in the user's own measurements, then among the presets in `presets/` (none is shipped
yet); where neither has it, the backend's default runs. From the second look-up of a problem on this reads no file.
Nothing is looked up for a traced problem, whose sizes may be symbols.

A measurement itself forces configurations with `using`, in this process alone.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from swat_flex.problem import Bucket, Problem

if TYPE_CHECKING:
    from autotune import Device, Found, Key, Space, Store, Value

Config = TypeVar("Config", bound=Hashable)

PRESETS = Path(__file__).parent / "presets"
KEPT = 4096  # look-ups remembered at a time


@dataclass(frozen=True, eq=False)
class Tunable(Generic[Config]):
    """A choice that a backend leaves open per problem.

    Attributes:
        name: "triton.forward".
        config_type: a frozen dataclass of scalars.
        choices: the values worth trying of each field, in the order of the fields.
        is_valid: whether a combination is allowed.
        default: what runs where nothing was measured.
        files: sources whose change makes old measurements worthless.
        schema: raised when the meaning of a field changes.
        joint: one configuration serves forward and backward together, so that the bucket tells whether both run, and
            whether slopes or logit_bias learn.
        first: what is tried right after the default, also where there is time for a few alone.
    """

    name: str
    config_type: type[Config]
    choices: Callable[[Problem], Mapping[str, Sequence[Value]]]
    is_valid: Callable[[Config], bool]
    default: Callable[[Problem], Config]
    files: tuple[Path, ...]
    schema: int = 1
    joint: bool = False
    first: Callable[[Problem], Sequence[Config]] = lambda problem: ()

    def space(self, problem: Problem) -> Space[Config]:
        """List its configurations for a problem, the default first."""
        from autotune import Space

        default, choices = self.default(problem), self.choices(problem)
        ordered = {
            field.name: _default_first(getattr(default, field.name), choices[field.name])
            for field in fields(self.config_type)  # type: ignore[arg-type]  # a dataclass, which Hashable does not say
        }
        return Space(self.config_type, ordered, self.is_valid, tuple(self.first(problem)))

    def bucket(self, problem: Problem) -> Bucket:
        """Return what problems that share a configuration have in common."""
        passes: Bucket = {"backward": problem.needs_grad, "learns_bias": problem.learns_bias} if self.joint else {}
        return problem.bucket() | passes

    def key(self, problem: Problem) -> Key:
        """Return what a measurement of this problem on this machine is kept under."""
        from autotune import Key

        described, versions = _machine(problem.device, torch.get_num_threads())
        return Key(self.name, self.schema, _source(self.files), self.bucket(problem), described, versions)


_found: dict[tuple[str, Problem], Found[Any] | None] = {}
_forced: dict[str, Any] = {}
_UNKNOWN: Any = object()


def lookup(tunable: Tunable[Config], problem: Problem) -> Config | None:
    """Return the configuration in force, or the one measured fastest for a problem's bucket; None for the default."""
    if problem.traced:
        return None
    if (config := forced(tunable)) is not None:
        return config
    found = find(tunable, problem)
    return None if found is None else found.config


def find(tunable: Tunable[Config], problem: Problem) -> Found[Config] | None:
    """Return what is behind `lookup`: the configuration and its measurement; None where the default runs."""
    if problem.traced:
        return None
    if problem.needs_grad and not tunable.joint:
        problem = replace(problem, needs_grad=False, learns_bias=False)  # as its operator sees the call
    found: Found[Config] | None = _found.get((tunable.name, problem), _UNKNOWN)
    if found is _UNKNOWN:
        if len(_found) >= KEPT:
            _found.clear()
        found = _found[tunable.name, problem] = _search(tunable, problem)
    return found


def forced(tunable: Tunable[Config]) -> Config | None:
    """Return the configuration in force: it runs or fails, and is not replaced where the device has no room for it."""
    return _forced.get(tunable.name)


@contextlib.contextmanager
def using(configs: Mapping[str, Any]) -> Iterator[None]:
    """Force configurations, by tunable's name, on every thread of this process; for measuring."""
    before = dict(_forced)
    _forced.update(configs)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def refresh() -> None:
    """Forget what was looked up: this process has measured something."""
    _found.clear()


@functools.cache
def store() -> Store:
    """Open the store of this process, in AUTOTUNE_DIR or the user's cache folder, above the shipped presets."""
    from autotune import open_store

    return open_store("swat_flex", PRESETS)


def origin(found: Found[Any] | None) -> str:
    """Say where a configuration comes from."""
    if found is None or found.entry is None:
        return "default"
    key, versions = found.entry.key, found.entry.key.versions
    if found.origin == "user":
        return f"user cache, entry {key.tunable} {key.digest[:8]}"
    measured = f"torch {versions.torch}, triton {versions.triton or 'absent'}"
    return f"shipped preset {key.tunable} {key.digest[:8]}, measured with {measured}"


def _search(tunable: Tunable[Config], problem: Problem) -> Found[Config] | None:
    """Ask the store; any trouble with it is told in a warning and leaves the default."""
    try:
        kept = store()
        if not kept.holds(tunable.name):  # spares a process with nothing measured the cost of a key
            return None
        found = kept.lookup(tunable.key(problem), tunable.space(problem))
    except (OSError, RuntimeError, ValueError) as error:
        message = f"no measurement was looked up for {tunable.name}: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    return None if found.origin == "default" else found


@functools.cache
def _machine(device: torch.device, threads: int) -> tuple[Device, Any]:
    """Describe a device and the installed versions; threads are part of the key since a CPU's description has them."""
    from autotune import describe_device, installed_versions

    return describe_device(device), installed_versions()


@functools.cache
def _source(files: tuple[Path, ...]) -> str:
    from autotune import source_hash

    return source_hash(*files)


def _default_first(default: Value, values: Sequence[Value]) -> tuple[Value, ...]:
    return default, *(value for value in values if (type(value), value) != (type(default), default))
