"""What threads of a warp exchange, and fences."""

from __future__ import annotations

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import Array, Mask
from swat_flex.inspection.ptx.site import Builder, Site, Step

_POWERS = np.uint64(1) << np.arange(32, dtype=np.uint64)


def _everybody(text: str) -> None:
    """Refuse to build anything for fewer than all threads of a warp."""
    if text not in ("-1", "0xffffffff", "0xFFFFFFFF", "4294967295"):
        raise Fault(f"expects all threads of a warp, got {text}")


def _shuffle(site: Site) -> Step:
    site.kind("b32")
    site.need("sync")
    mode = site.need("idx", "up", "down", "bfly")
    _everybody(site.operands[4])
    target, _, flagged = site.operands[0].partition("|")
    write, flag = site.sink(target.strip(), "b32"), site.sink(flagged.strip() or "_", "pred")
    a, b, c = (site.source(x, "b32") for x in site.operands[1:4])
    machine = site.machine

    def run(m: Mask) -> None:
        machine.groups_of(m)
        lane, by = machine.everyone % 32, b.astype(np.int64) & 31
        segment, clamp = (c.astype(np.int64) >> 8) & 31, c.astype(np.int64) & 31
        least = lane & segment
        most = least | (clamp & ~segment & 31)
        at = {"idx": least | (by & ~segment & 31), "up": lane - by, "down": lane + by, "bfly": lane ^ by}[mode]
        inside = at >= most if mode == "up" else at <= most
        write(a[machine.everyone - lane + np.where(inside, at, lane)], m)
        flag(inside, m)

    return run


def _ballot(p: Array, m: Mask) -> Array:
    """Return for each thread a bit for each thread of its warp that runs and where p is true."""
    on = (p if m is None else p & m).reshape(-1, 32)
    return np.repeat((on * _POWERS).sum(1).astype(np.uint32), 32)


def _vote(site: Site) -> Step:
    kind = site.kind()
    site.need("sync")
    mode = site.need("ballot", "any", "all", "uni")
    _everybody(site.operands[2])
    p, write = site.predicate(site.operands[1]), site.sink(site.operands[0], kind)
    machine = site.machine

    def run(m: Mask) -> None:
        machine.groups_of(m)
        votes = _ballot(p(), m)
        if mode == "ballot":
            write(votes, m)
        else:
            some, whole = votes != 0, votes == 0xFFFFFFFF
            write({"any": some, "all": whole, "uni": whole | ~some}[mode], m)

    return run


def _active_mask(site: Site) -> Step:
    site.kind("b32")
    write, machine = site.sink(site.operands[0], "b32"), site.machine
    return lambda m: write(_ballot(np.ones(machine.lanes, np.bool_), m), m)


def _elect(site: Site) -> Step:
    """One thread of each warp, the first."""
    site.need("sync")
    _everybody(site.operands[1])
    target, _, flagged = site.operands[0].partition("|")
    write, flag = site.sink(target.strip(), "b32"), site.sink(flagged.strip(), "pred")
    machine = site.machine
    first = machine.everyone % 32 == 0

    def run(m: Mask) -> None:
        machine.groups_of(m)
        write(0, m)
        flag(first, m)

    return run


def _warp_barrier(site: Site) -> Step:
    """bar.warp.sync: the threads of a warp run together here anyway."""
    site.need("warp")
    site.need("sync")
    _everybody(site.operands[0])
    return lambda m: None


def _memory_barrier(site: Site) -> Step:
    """membar: every thread sees every write at once here."""
    site.need("cta", "gl", "sys")
    return lambda m: None


def _fence(site: Site) -> Step:
    if site.take("proxy") is None:
        site.need("acq_rel", "sc")
        site.need("cta", "gpu", "sys")
        return lambda m: None
    site.need("async")
    site.need("shared:cta")
    machine = site.machine
    return lambda m: machine.shared.fence(machine.lanes_of(m))


BUILDERS: dict[str, Builder] = {
    "shfl": _shuffle,
    "vote": _vote,
    "activemask": _active_mask,
    "elect": _elect,
    "bar": _warp_barrier,
    "membar": _memory_barrier,
    "fence": _fence,
}
