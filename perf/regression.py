"""Benchmarks against a saved baseline, each as a ratio to a matrix product in the same run.

So a slower machine, or a slower day, is no regression: both terms of a ratio slow down.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table

from autotune.files import write_whole
from perf.record import RESULTS

BASELINE = RESULTS / "bench_baseline.json"
TOLERANCE = 0.25  # ratios on a busy-free machine repeat to about 10%
UNIT = "matmul"
OURS = ("banded", "cpp", "swat")
SCHEMA = 1


def ratios(file: Path) -> dict[str, float]:
    """Median over the group's matrix product, by `group: name`, from pytest-benchmark's JSON.

    Raises:
        ValueError: not such a file, or a group without a matrix product.
    """
    try:
        found = [(b["group"], b["param"] or b["name"], b["stats"]["median"]) for b in _json(file)["benchmarks"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected what pytest-benchmark writes with --benchmark-json, got {error}") from error
    units = {group: median for group, name, median in found if name.startswith(UNIT)}
    missing = {group for group, _, _ in found} - units.keys()
    if missing:
        raise ValueError(f"{file}: expected a {UNIT} in every group, got none in {sorted(map(str, missing))}")
    return {f"{g}: {name}": median / units[g] for g, name, median in found if not name.startswith(UNIT)}


def save(file: Path, baseline: Path = BASELINE) -> None:
    """Make the run the baseline."""
    data = {"schema": SCHEMA, "machine": _json(file).get("machine_info", {}).get("cpu", {}).get("brand_raw", "")}
    write_whole(baseline, json.dumps({**data, "ratios": ratios(file)}, indent=1) + "\n")


def compare(file: Path, baseline: Path = BASELINE) -> tuple[Table, list[str]]:
    """(a table, the names that became slower by more than `TOLERANCE`); only ours can regress."""
    now = ratios(file)
    if not baseline.exists():
        raise ValueError(f"{baseline.name}: expected a saved baseline, found none; make this run one with --save")
    saved = _json(baseline)
    if saved.get("schema") != SCHEMA:
        raise ValueError(f"{baseline}: schema: expected {SCHEMA}, got {saved.get('schema')!r}")
    columns = [Column(name, justify="right") for name in ("baseline", "now", "change")]
    title = "Times over a matrix product's in the same run"
    table, slower = Table("", *columns, box=box.SIMPLE_HEAD, title=title, title_justify="left"), []
    for name, ratio in now.items():
        old = saved["ratios"].get(name)
        if old is None:
            table.add_row(name, "new", f"{ratio:.2f}")
            continue
        change = ratio / old - 1
        if change > TOLERANCE and any(one in name for one in OURS):
            slower.append(name)
        table.add_row(name, f"{old:.2f}", f"{ratio:.2f}", f"{change:+.0%}")
    return table, slower


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file}: expected an object, got {type(data).__name__}")
    return data
