"""Measured figures in README.md and docs/benchmarks.md, made from a committed record and from nothing else.

They stand between two comments, `<!-- measured: FILE -->` and `<!-- /measured -->`: all cases of the record, or the one
that `<!-- measured: FILE, case NAME -->` names. FILE is relative to the repository.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from autotune.files import write_whole
from perf import bars
from perf.cases import WORDS
from perf.load import CORES
from perf.measure import MATMUL
from perf.record import Race, Record, load
from perf.report import milliseconds, times, units_of

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
BLOCK = re.compile(r"<!-- measured: (?P<file>\S+?)(?:, case (?P<case>[^>]+))? -->\n.*?<!-- /measured -->", re.DOTALL)


def rewrite(page: Path, file: Path | None = None, root: Path = ROOT) -> bool:
    """Make a page's blocks anew, each from the record it names, the first from `file`; return whether the page changed.

    Raises:
        ValueError: the page has no block, or the record no such case.
        OSError: a file cannot be read or written.
    """
    text = page.read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    if not found:
        raise ValueError(f"{page}: expected '<!-- measured: FILE -->' … '<!-- /measured -->', found none")
    new = text
    for n, old in enumerate(found):
        name = _relative(file, root) if file is not None and n == 0 else old["file"]
        new = new.replace(old[0], block(load(root / name), name, old["case"]))
    if new == text:
        return False
    write_whole(page, new)
    return True


def block(record: Record, name: str, case: str | None = None) -> str:
    """Write the comments and what stands between them: how it was measured and a table per case, or that of `case`."""
    names = list(dict.fromkeys(race.case.name for race in record.races))
    if case is not None and case not in names:
        raise ValueError(f"case: expected one of {', '.join(names)}, got {case!r}")
    device, versions = record.device, record.versions
    command = "bars" if record.suite == "bars" else f"--suite {record.suite}"
    rounds = f"medians of {max(row.rounds for race in record.races for row in race.timed)} interleaved rounds"
    how = (
        f"Milliseconds, {rounds} (2 for who takes 30 times as long as the best) ± the interquartile range over the "
        "median; in brackets how many times as long as the bold row, what `flex_swat` runs here. `swat NAME` is "
        "`flex_swat` with that backend."
    )
    if record.suite == "bars":
        how = f"Ratios between {rounds} of one run."
    measured = (
        f"`python -m perf {command}{' --quick' if record.quick else ''}`, {record.created[:10]}, "
        f"commit {record.commit}: {device.name} ({device.capability}, {units_of(record)}), torch {versions['torch']}. "
        f"{how} Everybody passed a check against a float64 definition in the same run."
    )
    lines = [f"<!-- measured: {name}{'' if case is None else f', case {case}'} -->", _wrapped(measured), ""]
    if record.others > CORES:
        lines += ["Other processes used the machine meanwhile: these figures are provisional.", ""]
    if record.suite == "bars":
        return "\n".join([*lines, *_bars(record), "", "<!-- /measured -->"])
    for one in names if case is None else [case]:
        lines += [*_table([race for race in record.races if race.case.name == one]), ""]
    if case is None:
        lines += [_ceilings(record), ""]
    return "\n".join([*lines, "<!-- /measured -->"])


def _bars(record: Record) -> list[str]:
    """Every bar of the CPU's kernels, and what was measured."""
    rows = [f"| {x.what} | {x.value:.2f} | {x.bound}{'' if x.holds else ', missed'} |" for x in bars.lines(record)]
    return ["| `cpp` | measured | bar |", "|---|---|---|", *rows, "", *map(_wrapped, bars.notes(record))]


def _table(races: list[Race]) -> list[str]:
    case = races[0].case
    titles = [f"{WORDS[race.passes]}, ms" for race in races]
    lines = [f"| {case.name}: {case.sizes} | {' | '.join(titles)} |", "|---|" + "---|" * len(races)]
    peers = dict.fromkeys(row.peer for race in races for row in sorted(race.timed, key=lambda row: row.ms))
    for peer in peers:
        bold = "**" if any(race.chosen == peer for race in races) else ""
        lines.append(f"| {bold}{peer}{bold} | {' | '.join(_cell(race, peer) for race in races)} |")
    return lines


def _cell(race: Race, peer: str) -> str:
    row = race.row(peer)
    if row is None:
        return "–"
    chosen = race.row(race.chosen)
    ratio = "" if chosen is None or row is chosen else f" ({times(row.ms / chosen.ms)})"
    return f"{milliseconds(row.ms)} ± {row.spread:.0%}{ratio}"


def _ceilings(record: Record) -> str:
    """Say what share of the machine's own limits ours reached, over all cases."""
    shares = []
    for race in record.races:
        row = race.row(race.chosen)
        if row is not None and MATMUL in race.ceilings:
            share = row.flops_per_second / race.ceilings[MATMUL].per_second
            shares.append(f"{race.case.name} {share:.2f} {race.passes}")
    product = next(race.ceilings[MATMUL].what for race in record.races)
    text = f"Share of the FLOP/s of `{product}` in the same rounds, visible pairs alone counted: {', '.join(shares)}."
    return _wrapped(text)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _relative(file: Path, root: Path) -> str:
    try:
        return file.resolve().relative_to(root.resolve()).as_posix()
    except ValueError as error:
        raise ValueError(f"file: expected a record inside the repository, got {file}") from error
