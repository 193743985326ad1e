"""What tuning found, in data and in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune import Entry, Result, Timing


@dataclass(frozen=True)
class Outcome:
    """What one search found.

    Attributes:
        name: the tunable's, "banded.forward".
        shape: the problem, in words.
        result: what the search measured; None when it was left out.
        entry: what is kept; None when nothing was right, or the search was left out.
        saved: whether the entry is on disk; else it lasts as long as this process.
        note: why it was left out, or why nothing is kept.
    """

    name: str
    shape: str
    result: Result[Any] | None = None
    entry: Entry | None = None
    saved: bool = False
    note: str = ""

    @property
    def default(self) -> Timing | None:
        """The default's time in the final comparison; None when it failed or nothing was measured."""
        return None if self.result is None else self.result.timings.get(self.result.default)

    @property
    def winner(self) -> Timing | None:
        return None if self.result is None or self.result.winner is None else self.result.timings[self.result.winner]

    def __str__(self) -> str:
        if self.result is None or self.winner is None:
            return f"{self.name}, {self.shape}: {self.note}"
        won = f"{self.result.winner} {self.winner.median_ms:.4g} ms ± {self.winner.spread:.0%}"
        if self.default is None:
            return f"{self.name}, {self.shape}: {won}, the default failed"
        before = f"default {self.default.median_ms:.4g} ms ± {self.default.spread:.0%}"
        return f"{self.name}, {self.shape}: {won}, {before}, {self.result.speedup:.2f}x"


@dataclass(frozen=True)
class Tuned:
    """All that one call of `tune` found.

    Attributes:
        outcomes: what each search found, in the order of the searches.
        place: where entries are kept, in words.
        interrupted: whether Ctrl-C ended it.
    """

    outcomes: tuple[Outcome, ...]
    place: str
    seconds: float
    interrupted: bool

    def __str__(self) -> str:
        saved = sum(outcome.saved for outcome in self.outcomes)
        unsaved = sum(outcome.entry is not None and not outcome.saved for outcome in self.outcomes)
        where = f"{saved} saved in {self.place}"
        if unsaved:
            where += f", {unsaved} kept for this process only (set AUTOTUNE_DIR to a folder that can be written)"
        ended = "interrupted after" if self.interrupted else "in"
        return "\n".join([*map(str, self.outcomes), f"{where}; {ended} {self.seconds:.1f} s"])
