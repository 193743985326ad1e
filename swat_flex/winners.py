"""What was measured fastest for a call: the look-up that operators make, which never tunes, compiles or writes.

A call's bucket is looked for in the user's own measurements, then among the presets shipped in `presets/`; where
neither has it, the backend's default runs. From the second look-up of a call on this reads no file. Nothing is looked
up while tracing: operators call it from their implementations, where sizes are numbers, the door on plain tensors only.

A measurement itself forces configurations with `using`, in this process alone.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from swat_flex.problem import Bucket, SwatProblem
from swat_flex.window import Window

if TYPE_CHECKING:
    from autotune import Device, Found, Key, Space, Store, Value

Config = TypeVar("Config", bound=Hashable)

PRESETS = Path(__file__).parent / "presets"
KEPT = 4096  # calls remembered at a time


class Call(NamedTuple):
    """What of a call a configuration may depend on; cheap to build and to hash."""

    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    threads: int  # 0 but on a CPU
    left: int | None
    right: int | None
    activation: str
    slopes: bool
    logit_bias: bool
    documents: bool
    backward: bool

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, slopes: object, logit_bias: object, document_ids: object, window: Window,
        activation: str, backward: bool = False,
    ) -> Call:  # fmt: skip
        """Of validated arguments; `backward` where one configuration serves forward and backward together."""
        device = q.device
        return cls(
            q.shape, k.shape, v.shape[3], q.dtype, device, torch.get_num_threads() if device.type == "cpu" else 0,
            window.left, window.right, activation, slopes is not None, logit_bias is not None,
            document_ids is not None, backward,
        )  # fmt: skip

    def problem(self) -> SwatProblem:
        batch, q_heads, q_len, head_dim = self.q_shape
        return SwatProblem(
            batch=batch,
            q_heads=q_heads,
            kv_heads=self.k_shape[1],
            q_len=q_len,
            kv_len=self.k_shape[2],
            head_dim=head_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            device_type=self.device.type,
            window=Window(self.left, self.right),
            activation=self.activation,
            has_slopes=self.slopes,
            has_logit_bias=self.logit_bias,
            has_documents=self.documents,
            needs_grad=self.backward,
        )


@dataclass(frozen=True, eq=False)
class Tunable(Generic[Config]):
    """Something that a backend lets be chosen per problem.

    Attributes:
        name: "triton.forward".
        config_type: a frozen dataclass of scalars.
        choices: the values worth trying of each field, in the order of the fields.
        is_valid: whether a combination is allowed.
        default: what runs where nothing was measured.
        files: sources whose change makes old measurements worthless.
        schema: raised when the meaning of a field changes.
        joint: one configuration serves forward and backward together, so that the bucket tells whether both run.
    """

    name: str
    config_type: type[Config]
    choices: Callable[[SwatProblem], Mapping[str, Sequence[Value]]]
    is_valid: Callable[[Config], bool]
    default: Callable[[SwatProblem], Config]
    files: tuple[Path, ...]
    schema: int = 1
    joint: bool = False

    def space(self, problem: SwatProblem) -> Space[Config]:
        """Its configurations for a problem, the default first."""
        from autotune import Space

        default, choices = self.default(problem), self.choices(problem)
        ordered = {
            field.name: _default_first(getattr(default, field.name), choices[field.name])
            for field in fields(self.config_type)  # type: ignore[arg-type]  # a dataclass, which Hashable does not say
        }
        return Space(self.config_type, ordered, self.is_valid)

    def bucket(self, problem: SwatProblem) -> Bucket:
        return problem.bucket() | ({"backward": problem.needs_grad} if self.joint else {})

    def key(self, problem: SwatProblem, device: torch.device) -> Key:
        """What a measurement on this machine is kept under."""
        from autotune import Key

        described, versions = _machine(device, torch.get_num_threads())
        return Key(self.name, self.schema, _source(self.files), self.bucket(problem), described, versions)


_found: dict[tuple[str, Call], Found[Any] | None] = {}
_forced: dict[str, Any] = {}
_UNKNOWN: Any = object()


def lookup(tunable: Tunable[Config], call: Call) -> Config | None:
    """The configuration measured fastest for a call's bucket, or the one in force; None where the default is to run."""
    if _forced and tunable.name in _forced:
        forced: Config = _forced[tunable.name]
        return forced
    found = find(tunable, call)
    return None if found is None else found.config


def find(tunable: Tunable[Config], call: Call) -> Found[Config] | None:
    """What is behind `lookup`: the configuration, where it comes from and its measurement; None for the default."""
    found: Found[Config] | None = _found.get((tunable.name, call), _UNKNOWN)
    if found is _UNKNOWN:
        if len(_found) >= KEPT:
            _found.clear()
        found = _found[tunable.name, call] = _search(tunable, call)
    return found


def forced(tunable: Tunable[Config]) -> Config | None:
    """The configuration in force: it runs or fails, and is not replaced where the device has no room for it."""
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
    """The store of this process, in AUTOTUNE_DIR or the user's cache folder, above the shipped presets."""
    from autotune import open_store

    return open_store("swat_flex", PRESETS)


def describe(found: Found[Any] | None) -> str:
    """Where a configuration comes from, in words."""
    if found is None or found.entry is None:
        return "default"
    key, versions = found.entry.key, found.entry.key.versions
    if found.origin == "user":
        return f"user cache, entry {key.tunable} {key.digest[:8]}"
    measured = f"torch {versions.torch}, triton {versions.triton or 'absent'}"
    return f"shipped preset {key.tunable} {key.digest[:8]}, measured with {measured}"


def _search(tunable: Tunable[Config], call: Call) -> Found[Config] | None:
    """What the store holds; any trouble with it is told in a warning and leaves the default."""
    try:
        kept = store()
        if not kept.holds(tunable.name):  # spares a process with nothing measured the cost of a key
            return None
        problem = call.problem()
        found = kept.lookup(tunable.key(problem, call.device), tunable.space(problem))
    except (OSError, RuntimeError, ValueError) as error:
        message = f"no measurement was looked up for {tunable.name}: {type(error).__name__}: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    return None if found.origin == "default" else found


@functools.cache
def _machine(device: torch.device, threads: int) -> tuple[Device, Any]:
    """Of a device while torch has so many threads, which only a CPU's description holds."""
    from autotune import describe_device, installed_versions

    return describe_device(device), installed_versions()


@functools.cache
def _source(files: tuple[Path, ...]) -> str:
    from autotune import source_hash

    return source_hash(*files)


def _default_first(default: Value, values: Sequence[Value]) -> tuple[Value, ...]:
    return default, *(value for value in values if (type(value), value) != (type(default), default))
