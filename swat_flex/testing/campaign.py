"""`Campaign`: what many runs of the search found together, in a file that each of them goes on with."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autotune.files import write_whole
from swat_flex.testing.check import Verdict

SCHEMA = 1
PACKAGES = ("swat_flex", "torch", "triton", "hypothesis")


@dataclass(slots=True)
class Count:
    """Cases of one kind and dtype; `excluded` beside them overflow.

    use, of: the worst share of the element rule, and by which tensor; trend: of the rows' rule.
    """

    cases: int = 0
    excluded: int = 0
    use: float = 0.0
    of: str = ""
    trend: float = 0.0

    def add(self, verdict: Verdict) -> None:
        self.cases += not verdict.excluded
        self.excluded += verdict.excluded
        self.merge(Count(0, 0, verdict.use, verdict.name, verdict.trend))

    def merge(self, other: Count) -> None:
        self.cases += other.cases
        self.excluded += other.excluded
        if other.use > self.use:
            self.use, self.of = other.use, other.of
        self.trend = max(self.trend, other.trend)


@dataclass(slots=True)
class Campaign:
    """The record of a campaign.

    Attributes:
        counts: by kind (a backend, or a backend that decodes) and dtype.
        runs: seed, seconds, processes, cases, command and the failure, if there was one, of each.
    """

    path: Path
    counts: dict[str, Count] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Campaign:
        """The record in a file, an empty one if there is none; ValueError if it is something else."""
        if not path.exists():
            return cls(path)
        try:
            record = json.loads(path.read_text())
            if record["schema"] != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}, got {record['schema']}")
            return cls(path, {name: Count(**count) for name, count in record["counts"].items()}, record["runs"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: expected a record of `swat-flex fuzz --record`, got {error!r}") from error

    @property
    def cases(self) -> int:
        return sum(count.cases for count in self.counts.values())

    @property
    def seeds(self) -> int:
        return len({run["seed"] for run in self.runs})

    def add(self, counts: dict[tuple[str, str], Count], **run: Any) -> None:
        """Count one run more, beside what other processes have written meanwhile, and write the file whole."""
        now = self.load(self.path)
        self.counts, self.runs = now.counts, now.runs
        for (kind, dtype), count in counts.items():
            self.counts.setdefault(f"{kind} {dtype}", Count()).merge(count)
        self.runs.append(run | {"cases": sum(count.cases for count in counts.values())})
        write_whole(self.path, json.dumps(self.to_json(), indent=1) + "\n")

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "cases": self.cases,
            "seeds": self.seeds,
            "seconds": round(sum(run["seconds"] for run in self.runs)),
            "use": max((count.use for count in self.counts.values()), default=0.0),
            "trend": max((count.trend for count in self.counts.values()), default=0.0),
            "failures": sum(run.get("failure") is not None for run in self.runs),
            "machine": {"processor": platform.machine(), "python": platform.python_version(), **_versions()},
            "counts": {name: asdict(count) for name, count in sorted(self.counts.items())},
            "runs": self.runs,
        }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
