"""Run the planned searches one after another and keep what they find."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from autotune import Budget, Entry, Event, LocalRunner, Result, Runner, WorkerRunner, search
from autotune.search import FINALISTS
from swat_flex import dispatch, tuned
from swat_flex.problem import Problem
from swat_flex.tuning.plan import CALLS, FINAL, SAMPLE_SECONDS, Planned, enough_for
from swat_flex.tuning.results import Outcome, Tuned
from swat_flex.tuning.tasks import Job, SwatTask

WORKERS = 4  # processes that compile for a GPU side by side
TIMEOUT = 180.0  # seconds for one step of a candidate; FlexAttention's compilation is the longest

OnEvent = Callable[[Planned, Event[Any]], object]


def run_searches(
    planned: Sequence[Planned], seconds: float, on_event: OnEvent, on_outcome: Callable[[Outcome], object]
) -> Tuned:
    """Run each search in turn; the time that one does not use goes to those after it.

    Later searches of a problem run with the configurations that won the earlier ones. After Ctrl-C no further search
    starts, and what was measured is kept.
    """
    started, waiting = time.monotonic(), list(planned)
    outcomes: list[Outcome] = []
    settings: dict[tuple[str, Problem], Any] = {}
    interrupted = False
    try:
        while waiting and not interrupted:
            left = seconds - (time.monotonic() - started)
            item, share = waiting.pop(0), left / (1 + len(waiting))
            job = item.job
            known = {name: config for (name, problem), config in settings.items() if problem == job.problem}
            outcome = _search(replace(item, seconds=share), replace(job, settings=known), on_event)
            if outcome.result is not None:
                interrupted = outcome.result.interrupted
                if outcome.result.winner is not None:
                    settings[job.tunable, job.problem] = outcome.result.winner
            outcomes.append(outcome)
            on_outcome(outcome)
    except KeyboardInterrupt:  # between two searches
        interrupted = True
    return Tuned(tuple(outcomes), tuned.store().place, time.monotonic() - started, interrupted)


def _search(item: Planned, job: Job, on_event: OnEvent) -> Outcome:
    outcome = Outcome(job.tunable, str(job.problem), note=item.refusal)
    if item.refusal:
        return outcome
    tunable, problem = job.find(), job.problem
    space = tunable.space(problem)

    def reject(config: Any) -> str | None:
        return dispatch.BACKENDS[config.backend].supports(problem) if tunable is dispatch.BACKEND else None

    with _runner(job) as runner:
        result = search(space, runner, reject=reject, budget=_budget(item), on_event=partial(on_event, item))
    if result.winner is None:
        return replace(outcome, result=result, note=_nothing(result))
    entry = Entry.of(tunable.key(problem), space, result)
    return replace(outcome, result=result, entry=entry, saved=_keep(entry))


def _runner(job: Job) -> AbstractContextManager[Runner[Any]]:
    """Run CPU candidates in this process; GPU candidates in workers, because a bad kernel can kill its process."""
    if job.problem.device.type == "cpu":
        return nullcontext(LocalRunner(SwatTask(job)))
    return WorkerRunner("swat_flex.tuning.tasks:SwatTask", job, workers=WORKERS, timeout=TIMEOUT)


def _budget(item: Planned) -> Budget:
    """Limit the trying of candidates, so that time is left for the round in progress and the final comparison."""
    sample = max(item.call_seconds, SAMPLE_SECONDS)
    exploring = max(item.seconds - 1.3 * (FINAL + CALLS + FINALISTS) * sample, item.seconds / 20, 0.01)
    return Budget(seconds=exploring, trials=enough_for(item.size, item.call_seconds, item.seconds))


def _keep(entry: Entry) -> bool:
    """Save an entry; an interrupted search's does not replace a better one."""
    store = tuned.store()
    saved = store.merge([entry]).unsaved == 0 if entry.interrupted else store.put(entry)
    tuned.refresh()
    return saved


def _nothing(result: Result[Any]) -> str:
    if result.interrupted:
        return "interrupted before anything was measured"
    first = next(iter(result.failures.values()), None)
    return f"nothing was right; the first failure, {first.kind}: {first.reason}" if first else "nothing was tried"
