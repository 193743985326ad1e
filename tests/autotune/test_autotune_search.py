import signal
from dataclasses import dataclass, replace

import pytest
from autotune_fakes import Choice, FakeTask, Script, choices, local

from autotune import Budget, DeviceLost, Failure, LocalRunner, Space, Timing, search
from autotune.search import FINAL_ROUNDS, decide

DEFAULT, FAST = Choice("default"), Choice("fast")


def run(**scripts):
    return search(choices(*scripts), local(**scripts))


def test_the_fastest_wins_and_every_timing_is_told():
    result = run(default=Script((4.0,)), slow=Script((9.0,)), fast=Script((1.0, 1.0, 1.1)), next=Script((2.0,)))
    assert result.winner == FAST
    assert result.speedup == 4.0
    assert result.clock == "fake"
    assert not result.interrupted
    assert not result.failures
    assert [config.name for config in result.timings] == ["default", "slow", "fast", "next"]
    assert result.timings[DEFAULT] == Timing(4.0, 0.0, FINAL_ROUNDS)
    assert result.timings[FAST].rounds == FINAL_ROUNDS
    assert result.timings[FAST].spread == pytest.approx(0.1 / 2, rel=1.01)


@pytest.mark.parametrize(
    ("script", "failure"),
    [
        (Script((0.1,), does="wrong"), Failure("wrong", "2.0 instead of 1.0")),
        (Script((0.1,), does="raise", at="compile"), Failure("error", "RuntimeError: out of resources")),
        (Script((0.1,), does="raise", at="run"), Failure("error", "RuntimeError: out of resources")),
        (Script((0.1,), does="raise", at="sample", after=12), Failure("error", "RuntimeError: out of resources")),
        (Script((0.1,), does="reject", at="compile"), Failure("rejected", "spills 48 registers")),
    ],
)
def test_a_fast_failure_never_wins(script, failure):
    result = run(default=Script((4.0,)), bad=script, fast=Script((1.0,)))
    assert result.winner == FAST
    assert result.failures == {Choice("bad"): failure}
    assert Choice("bad") not in result.timings


def test_a_long_reason_keeps_its_beginning_and_its_end():
    failure = run(default=Script(), bad=Script(does="quote")).failures[Choice("bad")]
    assert failure.reason.startswith("RuntimeError: out of kernel")
    assert failure.reason.endswith("kernel resources")
    assert len(failure.reason) < 1100


def test_a_winner_that_turned_wrong_while_it_was_timed_is_dropped():
    task = FakeTask({"default": Script((4.0,)), "bad": Script((0.1,)), "fast": Script((1.0,))})
    checked = []

    def check(output):
        checked.append(output)
        return "stale result" if len(checked) == 4 else None  # three admissions, then the winner's second check

    task.check = check
    result = search(choices("default", "bad", "fast"), LocalRunner(task))
    assert result.winner == FAST
    assert result.failures == {Choice("bad"): Failure("wrong", "stale result")}


def test_a_programming_error_surfaces():
    with pytest.raises(NameError, match="warsp"):
        run(default=Script(), bad=Script(does="err"))


def test_a_lost_device_surfaces_where_no_worker_guards():
    with pytest.raises(DeviceLost, match="illegal memory access"):
        run(default=Script(), bad=Script(does="lose"))


def test_noise_does_not_win_by_luck():
    """One sample of the noisy candidate in four is the fastest of all, its first ones among them."""
    lucky = (0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, *([2.5, 2.6, 0.5, 2.4] * 10))
    result = run(default=Script((4.0,)), noisy=Script(lucky), fast=Script((1.0,)))
    assert result.winner == FAST
    assert result.timings[Choice("noisy")].median_ms > 1.0


def test_ties_within_the_spread_go_to_the_earlier():
    result = run(default=Script((1.0, 1.1, 1.2)), other=Script((0.95, 1.05, 1.15)))
    assert result.winner == DEFAULT
    steady, noisy = Timing(1.0, 0.01, 15), Timing(0.9, 0.2, 15)
    assert decide({Choice("a"): steady, Choice("b"): noisy}) == Choice("a")
    assert decide({Choice("b"): noisy, Choice("a"): Timing(0.8, 0.01, 15)}) == Choice("a")
    assert decide({Choice("a"): steady, Choice("b"): Timing(0.998, 0.0, 15)}) == Choice("a")


def test_static_facts_keep_a_candidate_from_starting():
    task = FakeTask({"default": Script(), "big": Script((0.1,)), "fast": Script((0.5,))})

    def reject(config):
        return "needs 300 KiB of shared memory" if config.name == "big" else None

    result = search(choices("default", "big", "fast"), LocalRunner(task), reject=reject)
    assert result.winner == FAST
    assert result.failures == {Choice("big"): Failure("rejected", "needs 300 KiB of shared memory")}
    assert all(name != "big" for _, name in task.calls)


def test_a_failed_default_leaves_no_speedup_and_no_right_candidate_no_winner():
    result = run(default=Script(does="raise"), fast=Script())
    assert (result.winner, result.speedup) == (FAST, None)
    result = run(default=Script(does="raise"), fast=Script(does="wrong"))
    assert (result.winner, result.speedup) == (None, None)
    assert [failure.kind for failure in result.failures.values()] == ["error", "wrong"]


def test_ctrl_c_keeps_what_was_measured():
    result = run(default=Script((4.0,)), fast=Script((1.0,)), stop=Script(does="interrupt"), never=Script((0.1,)))
    assert result.interrupted
    assert result.winner == FAST
    assert list(result.timings) == [DEFAULT, FAST]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_final_keeps_the_longer_timing():
    stop = Script((1.0,), does="interrupt", at="sample", after=10)
    result = run(default=Script((1.2,)), fast=stop)
    assert result.interrupted
    assert result.winner == FAST
    assert [timing.rounds for timing in result.timings.values()] == [7, 7]


def test_ctrl_c_before_anything_was_measured():
    result = run(default=Script(does="interrupt", at="compile"))
    assert result.interrupted
    assert result.winner is None


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    stages: int


GRID = Space(Tile, {"rows": range(1, 21), "columns": range(1, 21), "stages": range(1, 6)})


class Bowl:
    """A task on 2000 tiles whose time is smallest at one; `time` advances a second per compilation."""

    def __init__(self):
        self.clock = self
        self.name = "fake"
        self.time = 0.0
        self.compiled = []

    def compile(self, config):
        self.compiled.append(config)
        self.time += 1.0

    def prepare(self, config):
        return lambda: config

    def check(self, output):
        return None

    def sampler(self, run):
        tile = run()
        return lambda: 1.0 + (tile.rows - 13) ** 2 + (tile.columns - 5) ** 2 + (tile.stages - 3) ** 2


def test_a_large_space_is_sampled_and_walked_to_the_best():
    task = Bowl()
    result = search(GRID, LocalRunner(task))
    assert result.winner == Tile(13, 5, 3)
    assert task.compiled[0] == GRID.default
    assert len(task.compiled) == len(set(task.compiled)) < 200
    assert result.timings[GRID.default].rounds == FINAL_ROUNDS


def test_what_is_promising_is_tried_right_after_the_default():
    promising = (Tile(13, 5, 3), Tile(2, 2, 2))
    task = Bowl()
    search(replace(GRID, first=promising), LocalRunner(task), budget=Budget(trials=6))
    assert task.compiled[0] == GRID.default
    assert set(task.compiled[1:3]) == set(promising)


def test_a_budget_in_trials():
    for trials in (1, 2, 40):
        task = Bowl()
        result = search(GRID, LocalRunner(task), budget=Budget(trials=trials))
        assert len(task.compiled) == len(result.timings) == trials
        assert task.compiled[0] == GRID.default
        assert result.winner == min(result.timings, key=lambda tile: result.timings[tile].median_ms)


def test_a_budget_in_seconds():
    task = Bowl()
    result = search(GRID, LocalRunner(task), budget=Budget(seconds=20), now=lambda: task.time)
    assert len(task.compiled) == 20
    assert GRID.default in result.timings
    task = Bowl()
    search(GRID, LocalRunner(task), budget=Budget(seconds=0.001), now=lambda: task.time)
    assert task.compiled == [GRID.default]


@pytest.mark.parametrize("budget", [{"seconds": 0}, {"trials": -1}])
def test_a_budget_is_positive(budget):
    with pytest.raises(ValueError, match="expected a number above 0 or None"):
        Budget(**budget)


def test_events_tell_the_story():
    events = []
    space = choices("default", "bad", "fast")
    scripts = {"default": Script((2.0,)), "bad": Script(does="wrong"), "fast": Script((1.0,))}
    result = search(space, local(**scripts), on_event=events.append)
    story = [(event.kind, event.config and event.config.name, event.done) for event in events]
    assert story[:9] == [
        ("planned", None, 0),
        ("started", "default", 0),
        ("measured", "default", 1),
        ("best", "default", 1),
        ("started", "bad", 1),
        ("failed", "bad", 2),
        ("started", "fast", 2),
        ("measured", "fast", 3),
        ("best", "fast", 3),
    ]
    assert all(event.planned == 3 for event in events)
    assert events[5].failure == result.failures[Choice("bad")]
    assert events[-1].timing in result.timings.values()


def test_plans_of_a_sampled_search_are_kept():
    events = []
    search(GRID, LocalRunner(Bowl()), on_event=events.append, reject=lambda tile: "odd" if tile.rows % 2 else None)
    assert all(event.done <= event.planned for event in events)
    assert events[-1].done == events[-1].planned
