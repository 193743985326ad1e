"""Measured figures in README.md and docs/benchmarks.md, made from a committed record and from nothing else.

They stand between two comments, `<!-- measured: FILE -->` and `<!-- /measured -->`: all cases of the record, or the one
that `<!-- measured: FILE, case NAME -->` names. FILE is relative to the repository.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from autotune.files import write_whole
from perf.record import Race, Record, load
from perf.report import milliseconds, times, units_of

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
BLOCK = re.compile(r"<!-- measured: (?P<file>\S+?)(?:, case (?P<case>[^>]+))? -->\n.*?<!-- /measured -->", re.DOTALL)


def rewrite(page: Path, file: Path | None = None, root: Path = ROOT) -> bool:
    """Make a page's block anew from `file`, or from the record it names; return whether the page changed.

    Raises:
        ValueError: the page has no block, or the record no such case.
        OSError: a file cannot be read or written.
    """
    text = page.read_text(encoding="utf-8")
    found = BLOCK.search(text)
    if found is None:
        raise ValueError(f"{page}: expected '<!-- measured: FILE -->' … '<!-- /measured -->', found none")
    name = found["file"] if file is None else _relative(file, root)
    new = text[: found.start()] + block(load(root / name), name, found["case"]) + text[found.end() :]
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
    measured = (
        f"`python -m perf --suite {record.suite}{' --quick' if record.quick else ''}`, {record.created[:10]}, "
        f"commit {record.commit}: {device.name} ({device.capability}, {units_of(record)}), torch {versions['torch']}. "
        f"Milliseconds, medians of {_rounds(record)} interleaved rounds (2 for who takes 30 times as long as the best) "
        "± the interquartile range over the median; in brackets how many times as long as the bold row, what "
        "`flex_swat` runs here. `swat NAME` is `flex_swat` with that backend. Everybody passed a check against a "
        "float64 definition in the same run."
    )
    lines = [f"<!-- measured: {name}{'' if case is None else f', case {case}'} -->", _wrapped(measured), ""]
    if any(race.others is not None and race.others > 0.15 for race in record.races):
        lines += ["Other processes used the machine meanwhile: these figures are provisional.", ""]
    for one in names if case is None else [case]:
        lines += [*_table([race for race in record.races if race.case.name == one]), ""]
    if case is None:
        lines += [_ceilings(record), ""]
    return "\n".join([*lines, "<!-- /measured -->"])


def _table(races: list[Race]) -> list[str]:
    case = races[0].case
    passes = {"forward": "forward", "both": "forward and backward"}
    titles = [f"{passes[race.passes]}, ms" for race in races]
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
        if row is not None and "matmul" in race.ceilings:
            share = row.flops / row.ms * 1e3 / race.ceilings["matmul"].per_second
            shares.append(f"{race.case.name} {share:.2f} {'forward' if race.passes == 'forward' else 'both'}")
    product = next(race.ceilings["matmul"].what for race in record.races)
    text = f"Share of the FLOP/s of `{product}` in the same rounds, visible pairs alone counted: {', '.join(shares)}."
    return _wrapped(text)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _rounds(record: Record) -> int:
    return max(row.rounds for race in record.races for row in race.timed)


def _relative(file: Path, root: Path) -> str:
    try:
        return file.resolve().relative_to(root.resolve()).as_posix()
    except ValueError as error:
        raise ValueError(f"file: expected a record inside the repository, got {file}") from error
