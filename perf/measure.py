"""Races: prepare the contenders, check them, count their memory, then time them in turn with the ceilings."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from autotune import Timing, clock_for, time_together
from autotune.memory import peak_bytes
from perf.cases import Case, Passes
from perf.check import Checked, check
from perf.load import Meter
from perf.peers import Peer, Run, one_line
from perf.record import Ceiling, Race, Row
from swat_flex import dispatch

MATMUL, COPY = "matmul", "copy"
Advance = Callable[[str], object]


@dataclass(frozen=True)
class Setting:
    """How a race is run.

    Attributes:
        rounds: samples behind each median.
        hopeless: from the second round on, who takes this many times the best leaves, with the samples it has.
        sizes: edge of the square matrix product and bytes of the copy that are the ceilings.
    """

    device: torch.device
    rounds: int
    hopeless: float = math.inf
    sizes: tuple[int, int] = (2048, 2**28)

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Setting:
        if device.type == "cpu":
            return cls(device, 3 if quick else 9, 30.0)
        return cls(device, 5 if quick else 15, 50.0, (8192, 2**31))


@dataclass
class Entrant:
    """A contender that passed its check."""

    peer: Peer
    run: Callable[[], object]
    checked: Checked
    peak: int | None
    first_call: float
    leaves: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Limit:
    """What a ceiling is, the FLOPs or bytes of one run, and the run."""

    what: str
    amount: float
    run: Callable[[], object]

    def reached(self, timing: Timing) -> Ceiling:
        return Ceiling(self.what, self.amount / timing.median_ms * 1e3, timing.median_ms, timing.spread)


def run_races(
    contests: Sequence[tuple[Case, Passes, Sequence[Peer]]], setting: Setting, advance: Advance = lambda _: None,
    told: Callable[[str, Entrant | Row | float], object] = lambda *_: None, until: float = math.inf,
) -> tuple[Race, ...]:  # fmt: skip
    """Time every peer that is installed, supports its case and is right; a race for each contest.

    All of them are timed in the same rounds, so that any two times compare, beside the ceilings of the first one's
    dtype.

    Args:
        contests: sizes, what is timed, the contenders.
        setting: rounds and ceilings.
        advance: told in words what is being done.
        told: told of each admission and of each sample in ms as soon as it is there, by the contender's name.
        until: time.monotonic() after which nobody more is admitted, and no further round begins.
    """
    found: dict[tuple[int, str], Entrant | Row] = {}
    for n, (case, passes, peers) in enumerate(contests):
        tensors = case.tensors(setting.device)
        for peer in peers:
            advance(f"{case.name}, {passes}: {peer.name}")
            entrant: Entrant | Row = Row(**_identity(peer, case), status="skipped", reason="no time was left for it")
            if time.monotonic() < until:
                entrant = admit(peer, case, passes, tensors, setting.device)
            told(peer.name, entrant)
            found[n, peer.name] = entrant
    first, passes, _ = contests[0]
    what = f"{first.name}, {passes}: " if len(contests) == 1 else ""
    advance(f"{what}{setting.rounds} rounds")
    limits = _ceilings(first, setting)
    runs = {key: x.run for key, x in found.items() if isinstance(x, Entrant)}
    runs |= {(-1, name): limit.run for name, limit in limits.items()}  # -1: of no race, and so of all
    meter = Meter()
    # A graph leaves the host's launch cost out of a forward; who cannot be captured, and fails so, has no time.
    times = time_together(
        runs, clock_for(setting.device, graphs=passes == "forward"), setting.rounds, setting.hopeless,
        on_sample=lambda key, ms: None if ms is None else told(key[1], ms), go_on=lambda: time.monotonic() < until,
    )  # fmt: skip
    others = meter.read()
    ceilings = {name: limits[name].reached(timing) for (n, name), timing in times.timings.items() if n == -1}
    races = []
    for n, (case, passes, peers) in enumerate(contests):
        rows = []
        for key in ((n, peer.name) for peer in peers):
            entrant, end = found[key], times.timings.get(key) or times.failed.get(key, "left the race")
            rows.append(_timed_row(entrant, case, passes, end) if isinstance(entrant, Entrant) else entrant)
        chosen = _chosen(case, peers, rows, setting)
        races.append(Race(case, passes, times.clock, chosen, others, ceilings, tuple(rows)))
    return tuple(races)


def admit(peer: Peer, case: Case, passes: Passes, tensors: tuple[Tensor, ...], device: torch.device) -> Entrant | Row:
    """A checked contender, or the row that says why it is none. A peer's own exception is its row's reason."""
    base = _identity(peer, case)
    reason = peer.available(device) or peer.supports(case, device, passes)
    if reason is not None:
        return Row(**base, status="skipped", reason=reason)
    try:
        began = time.perf_counter()
        run, forward, leaves = bind(peer, case, passes, tensors)
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        first_call = time.perf_counter() - began
        checked = check(peer, case, leaves, forward, passes)
        if not checked.right:
            errors = {name: error for name, error in checked.errors.items() if math.isfinite(error)}
            return Row(**base, status="refused", reason=f"wrong: {checked}", errors=errors, allowed=checked.allowed)
        return Entrant(peer, run, checked, peak_bytes(run, device), first_call, leaves)
    except Exception as error:  # one contender must not end the run of the others
        return Row(**base, status="failed", reason=one_line(error))
    finally:
        gc.collect()


def _identity(peer: Peer, case: Case) -> dict[str, Any]:
    """The fields of a row that are known before anything runs."""
    return {"peer": peer.name, "definition": str(peer.definition(case)), "ours": peer.ours}


def bind(
    peer: Peer, case: Case, passes: Passes, tensors: tuple[Tensor, ...]
) -> tuple[Callable[[], object], Run, tuple[Tensor, Tensor, Tensor]]:
    """Return what is timed, the forward it is made of, and the leaves that both are bound to.

    The leaves are the case's tensors in the peer's order of axes in memory, of a graph of their own.
    """
    laid = [x.transpose(1, 2).contiguous().transpose(1, 2) if peer.tokens_first else x for x in tensors]
    q, k, v = (x.detach().requires_grad_(passes == "both") for x in laid)
    forward = peer.prepare(case, q, k, v)
    if passes == "forward":
        return torch.no_grad()(forward), forward, (q, k, v)
    noise = torch.Generator(q.device).manual_seed(2)
    grad = torch.randn(q.shape, generator=noise, device=q.device).to(q.dtype)
    return lambda: torch.autograd.grad(forward(), (q, k, v), grad), forward, (q, k, v)


def _ceilings(case: Case, setting: Setting) -> dict[str, Limit]:
    edge, size = setting.sizes
    # A generator of its own: the device's may be the one that a failed capture spoiled.
    draw = torch.Generator(setting.device).manual_seed(3)
    a, b = torch.randn(2, edge, edge, generator=draw, device=setting.device).to(case.torch_dtype).unbind()
    product = torch.empty_like(a)
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return {
        MATMUL: Limit(f"torch.matmul {edge:,}³ {case.dtype}", 2.0 * edge**3, lambda: torch.mm(a, b, out=product)),
        COPY: Limit(f"copy of {size / 2**20:,.0f} MiB, read and written", 2.0 * size, lambda: target.copy_(source)),
    }


def _timed_row(entrant: Entrant, case: Case, passes: Passes, end: Timing | str) -> Row:
    """The row of who was admitted: its times, or why it has none."""
    peer, checked = entrant.peer, entrant.checked
    base = _identity(peer, case)
    if isinstance(end, str):
        return Row(**base, status="failed", reason=end)
    flops, moved = peer.definition(case).work(case, passes)
    with torch.set_grad_enabled(passes == "both"):
        configuration, source = peer.configured(case, *entrant.leaves)
    return Row(
        **base, **asdict(end), status="timed", flops=flops, bytes=moved, peak_bytes=entrant.peak,
        errors=checked.errors, use=checked.use, allowed=checked.allowed, configuration=configuration, source=source,
        first_call=entrant.first_call,
    )  # fmt: skip


def _chosen(case: Case, peers: Sequence[Peer], rows: Sequence[Row], setting: Setting) -> str:
    """The contender whom speed-ups are of: `swat_decode` where it runs, else what `backend="auto"` takes."""
    names = ["swat_decode"]
    swat = next((peer for peer in peers if peer.name.startswith("swat ")), None)
    if swat is not None:
        names.append(f"swat {dispatch.choose(swat.definition(case).problem(case, setting.device)).backend}")
    timed = [row.peer for row in rows if row.status == "timed"]
    return next((name for name in names if name in timed), "")
