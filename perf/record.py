"""What one run leaves behind: a JSON file that says what was measured, on what, and how far to trust it."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from autotune import Device, describe_device, installed_versions
from autotune.files import write_whole
from perf.cases import Case, Passes

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ceiling:
    """The most the device did in the same race: FLOP/s of a matrix product, or bytes/s of a copy (read and written)."""

    what: str
    per_second: float
    ms: float
    spread: float


@dataclass(frozen=True)
class Row:
    """One contender in one race.

    Attributes:
        peer: its name.
        definition: what it computes.
        status: "timed"; "skipped", "failed" or "refused" as wrong, with the reason, and then no time.
        flops, bytes: useful work and least traffic of what it computes.
        peak_bytes: memory beyond the inputs, output and gradients included; None where nobody counts it.
        errors: largest error against float64, by tensor; use, the share of the error budget, of which `allowed` passes.
        first_call: seconds of the first call, compilation included.
    """

    peer: str
    definition: str
    ours: bool
    status: str
    reason: str = ""
    median_ms: float | None = None
    spread: float | None = None
    rounds: int = 0
    flops: float = 0.0
    bytes: int = 0
    peak_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    use: float | None = None
    allowed: float | None = None
    configuration: str = ""
    source: str = ""
    first_call: float | None = None

    @property
    def ms(self) -> float:
        """The median of a timed row."""
        if self.median_ms is None:
            raise ValueError(f"status: expected 'timed', got {self.status!r}")
        return self.median_ms

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.ms * 1e3

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.ms * 1e3


@dataclass(frozen=True)
class Race:
    """Contenders timed in turn in the same rounds, with the ceilings among them.

    Attributes:
        chosen: the row that `flex_swat` or `swat_decode` would run, which speed-ups refer to; empty if it has no time.
        others: CPU cores that other processes used meanwhile; None if unknown.
    """

    case: Case
    passes: Passes
    clock: str
    chosen: str
    others: float | None
    ceilings: dict[str, Ceiling]
    rows: tuple[Row, ...]

    @property
    def timed(self) -> list[Row]:
        return [row for row in self.rows if row.status == "timed"]

    def row(self, peer: str) -> Row | None:
        """The timed row of a peer, if it has one."""
        return next((row for row in self.timed if row.peer == peer), None)


@dataclass(frozen=True)
class Record:
    """One run.

    `steps` and `failed_tests` are those of gpu-report: how each step ended, which tests failed. `figures` are those of
    bars that no race holds, by name.
    """

    suite: str
    quick: bool
    created: str
    commit: str
    device: Device
    versions: dict[str, str | None]
    threads: int
    load_before: dict[str, float | int | None]
    busy_ok: bool
    races: tuple[Race, ...]
    steps: tuple[dict[str, str], ...] = ()
    failed_tests: tuple[str, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def others(self) -> float:
        """The most CPU cores that other processes used during a race, as far as known."""
        return max((race.others or 0.0 for race in self.races), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def parse(cls, data: Any) -> Record:
        """Read what `to_json` wrote; raises ValueError for anything else."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"schema: expected {SCHEMA}, got {found!r}")
        try:
            races = tuple(_race(race) for race in data["races"])
            plain = {f.name: data[f.name] for f in fields(cls) if f.name in data}
            tuples = {name: tuple(data.get(name, ())) for name in ("steps", "failed_tests")}
            return cls(**{**plain, **tuples, "races": races, "device": Device(**data["device"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"record: expected the fields of schema {SCHEMA}, got {error}") from error


def _race(data: dict[str, Any]) -> Race:
    case = Case(**{**data["case"], "passes": tuple(data["case"]["passes"])})
    ceilings = {name: Ceiling(**ceiling) for name, ceiling in data["ceilings"].items()}
    rows = tuple(Row(**row) for row in data["rows"])
    return Race(**{**data, "case": case, "ceilings": ceilings, "rows": rows})


def save(record: Record, path: Path) -> None:
    """Write the record whole or not at all."""
    write_whole(path, json.dumps(record.to_json(), indent=1, allow_nan=False) + "\n")


def load(path: Path) -> Record:
    """Read a record; raises OSError, or ValueError for a file that is none."""
    try:
        return Record.parse(json.loads(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def surroundings(device: str) -> dict[str, Any]:
    """The fields of a record that do not depend on what is measured."""
    import torch

    import swat_flex

    versions = installed_versions()
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "device": describe_device(device),
        "versions": {
            "swat_flex": swat_flex.__version__,
            "torch": versions.torch,
            "triton": versions.triton,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
    }


def slug(device: Device) -> str:
    """The device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")


def _commit() -> str:
    """The commit measured, with a + where the library's sources were changed since; unknown outside a repository."""
    where = Path(__file__).parent.parent
    head_of, changes = "git rev-parse --short=10 HEAD", "git status --porcelain swat_flex autotune"
    try:
        head = subprocess.check_output(head_of.split(), cwd=where, text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output(changes.split(), cwd=where)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changed else "")
