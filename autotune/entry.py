"""What the store keeps: the key of a measurement, its outcome, and the JSON form of both."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias, get_args

from autotune.device import Device, Versions
from autotune.measure import Timing
from autotune.runner import Failure, FailureKind
from autotune.search import Result
from autotune.space import Config, Space, Value

Bucket: TypeAlias = Mapping[str, str | int | bool | None]

FORMAT = 1  # of the JSON; part of the key, so that releases that differ never read each other's files


def source_hash(*files: Path) -> str:
    """Hash source files, the same under any line ending: what a key's `source` should be.

    Args:
        files: everything whose change makes old measurements worthless.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_text(encoding="utf-8").encode() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Key:
    """What a measurement is valid for. Build it once per problem and keep it: hashing happens here.

    Attributes:
        tunable: its name.
        schema: number of the tunable's configuration type, raised when its meaning changes.
        source: hash of the tunable's source.
        bucket: the problem: names and str, int, bool or None.
        digest: hash of all the above; equality and hashing go by it alone, so that a look-up costs one comparison.
        preset_digest: hash of what a shipped preset must match: all but source and versions.

    Raises:
        TypeError: a bucket's name or value of another type.
    """

    tunable: str = field(compare=False)
    schema: int = field(compare=False)
    source: str = field(compare=False)
    bucket: Bucket = field(compare=False)
    device: Device = field(compare=False)
    versions: Versions = field(compare=False)
    digest: str = field(init=False, repr=False)
    preset_digest: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in self.bucket.items():
            if not isinstance(name, str) or not isinstance(value, str | int | None):
                raise TypeError(f"bucket: expected names with a str, int, bool or None each, got {name!r}: {value!r}")
        object.__setattr__(self, "bucket", dict(self.bucket))  # the caller may change theirs
        data = self.to_json()
        object.__setattr__(self, "digest", _digest(data))
        object.__setattr__(self, "preset_digest", _digest({**data, "source": None, "versions": None}))

    def to_json(self) -> dict[str, Any]:
        return {
            "tunable": self.tunable,
            "schema": self.schema,
            "source": self.source,
            "bucket": dict(sorted(self.bucket.items())),
            "device": asdict(self.device),
            "versions": asdict(self.versions),
        }

    @classmethod
    def parse(cls, data: Any) -> "Key":
        """The key that `to_json` wrote; raises KeyError, TypeError or ValueError for anything else."""
        device, versions = data["device"], data["versions"]
        kind, name, capability = (_typed(device[field], str) for field in ("kind", "name", "capability"))
        return cls(
            _typed(data["tunable"], str),
            _typed(data["schema"], int),
            _typed(data["source"], str),
            _typed(data["bucket"], dict),
            Device(kind, name, capability, _typed(device["units"], int)),
            Versions(_typed(versions["torch"], str), _typed(versions["triton"], str | None)),
        )


@dataclass(frozen=True)
class Entry:
    """The outcome of one search. Configurations are in their JSON form: the store knows no tunable's type.

    Attributes:
        timings: every right configuration and its timing.
        failures: every other configuration tried and its failure.
        clock: name of the clock that timed them.
        created: when, with its time zone.
    """

    key: Key
    winner: dict[str, Value]
    default: dict[str, Value]
    timings: list[tuple[dict[str, Value], Timing]]
    failures: list[tuple[dict[str, Value], Failure]]
    clock: str
    interrupted: bool
    created: datetime

    @classmethod
    def of(cls, key: Key, space: Space[Config], result: Result[Config]) -> "Entry":
        """The entry for a search's result.

        Raises:
            ValueError: the search found no winner.
        """
        if result.winner is None:
            raise ValueError(f"result: expected one with a winner, got none for {key.tunable!r}")
        return cls(
            key,
            space.to_json(result.winner),
            space.to_json(result.default),
            [(space.to_json(config), timing) for config, timing in result.timings.items()],
            [(space.to_json(config), failure) for config, failure in result.failures.items()],
            result.clock,
            result.interrupted,
            datetime.now(UTC).replace(microsecond=0),
        )

    @property
    def winner_ms(self) -> float:
        return self._median_ms(self.winner)

    @property
    def speedup(self) -> float | None:
        """The default's time over the winner's; None when the default failed."""
        if all(config != self.default for config, _ in self.timings):
            return None
        return self._median_ms(self.default) / self.winner_ms

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "key": self.key.to_json(),
            "winner": self.winner,
            "default": self.default,
            "clock": self.clock,
            "interrupted": self.interrupted,
            "created": self.created.isoformat(),
            "timings": [{"config": config, **asdict(timing)} for config, timing in self.timings],
            "failures": [{"config": config, **asdict(failure)} for config, failure in self.failures],
        }

    @classmethod
    def parse(cls, data: Any) -> "Entry":
        """The entry that `to_json` wrote.

        Raises:
            ValueError: anything else.
        """
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format: expected {FORMAT}, got {data['format']!r}")
            created = datetime.fromisoformat(data["created"])
            if created.utcoffset() is None:
                raise ValueError(f"created: expected a time with its zone, got {created}")
            timings = [(_typed(record["config"], dict), _timing(record)) for record in data["timings"]]
            failures = [(_typed(record["config"], dict), _failure(record)) for record in data["failures"]]
            winner, default = _typed(data["winner"], dict), _typed(data["default"], dict)
            if all(config != winner for config, _ in timings):
                raise ValueError(f"winner: expected one of the timed configurations, got {winner}")
            clock, interrupted = _typed(data["clock"], str), _typed(data["interrupted"], bool)
            return cls(Key.parse(data["key"]), winner, default, timings, failures, clock, interrupted, created)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"entry: expected one that autotune wrote, got {type(error).__name__}: {error}") from error

    def _median_ms(self, wanted: dict[str, Value]) -> float:
        return next(timing.median_ms for config, timing in self.timings if config == wanted)


def preferred(ours: Entry, theirs: Entry) -> Entry:
    """Which of two entries with one key to keep: the lower winner's time if one clock timed both, else the newer."""
    if ours.clock == theirs.clock:
        return theirs if theirs.winner_ms < ours.winner_ms else ours
    return theirs if theirs.created > ours.created else ours


def _timing(record: Any) -> Timing:
    median_ms, spread = float(_typed(record["median_ms"], int | float)), float(_typed(record["spread"], int | float))
    if not (0 < median_ms < math.inf and 0 <= spread < math.inf):
        raise ValueError(f"timings: expected finite times above 0, got {median_ms} ms with spread {spread}")
    return Timing(median_ms, spread, _typed(record["rounds"], int))


def _failure(record: Any) -> Failure:
    if record["kind"] not in get_args(FailureKind):
        raise ValueError(f"kind: expected one of {get_args(FailureKind)}, got {record['kind']!r}")
    return Failure(record["kind"], _typed(record["reason"], str))


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind}, got {value!r}")
    return value


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps({"format": FORMAT, **data}, sort_keys=True).encode()).hexdigest()
