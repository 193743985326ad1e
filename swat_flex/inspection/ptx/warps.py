"""What threads of a warp exchange, and fences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import Array, Mask
from swat_flex.inspection.ptx.site import Site, Step

_POWERS = np.uint64(1) << np.arange(32, dtype=np.uint64)


def _everybody(site: Site, text: str) -> None:
    """Refuse to build anything for fewer than all threads of a warp."""
    if text not in ("-1", "0xffffffff", "0xFFFFFFFF", "4294967295"):
        raise Fault(f"expects all threads of a warp, got {text}")


def _shuffle(site: Site) -> Step:
    if site.kind() != "b32":
        raise Fault("is known for b32 alone")
    site.need("sync")
    mode = site.need("idx", "up", "down", "bfly")
    _everybody(site, site.operands[4])
    targets = [name.strip() for name in site.operands[0].split("|")]
    write = site.sink(targets[0], "b32")
    flag = site.sink(targets[1], "pred") if len(targets) > 1 else None
    a, b, c = (site.source(x, "b32") for x in site.operands[1:4])
    machine = site.machine

    def run(m: Mask) -> None:
        machine.warps_of(m)
        lane, by = machine.everyone % 32, b.astype(np.int64) & 31
        segment, clamp = (c.astype(np.int64) >> 8) & 31, c.astype(np.int64) & 31
        least = lane & segment
        most = least | (clamp & ~segment & 31)
        at = {"idx": least | (by & ~segment & 31), "up": lane - by, "down": lane + by, "bfly": lane ^ by}[mode]
        inside = at >= most if mode == "up" else at <= most
        write(a[machine.everyone - lane + np.where(inside, at, lane)], m)
        if flag:
            flag(inside, m)

    return run


def _by_warp(p: Array, m: Mask) -> tuple[Array, Array]:
    """Return `[warps, 32]`: what is true of threads that run, and which run."""
    on = np.ones_like(p) if m is None else m
    return (p & on).reshape(-1, 32), on.reshape(-1, 32)


def _vote(site: Site) -> Step:
    kind = site.kind()
    site.need("sync")
    mode = site.need("ballot", "any", "all", "uni")
    _everybody(site, site.operands[2])
    p, write = site.predicate(site.operands[1]), site.sink(site.operands[0], kind)
    machine = site.machine

    def run(m: Mask) -> None:
        machine.warps_of(m)
        true, _ = _by_warp(p(), m)
        if mode == "ballot":
            value = (true * _POWERS).sum(1).astype(np.uint32)
        else:
            some, whole = true.any(1), true.all(1)
            value = {"any": some, "all": whole, "uni": whole | ~some}[mode]
        write(np.repeat(value, 32), m)

    return run


def _active_mask(site: Site) -> Step:
    if site.kind() != "b32":
        raise Fault("is known for b32 alone")
    write, machine = site.sink(site.operands[0], "b32"), site.machine

    def run(m: Mask) -> None:
        _, on = _by_warp(np.ones(machine.lanes, np.bool_), m)
        write(np.repeat((on * _POWERS).sum(1).astype(np.uint32), 32), m)

    return run


def _elect(site: Site) -> Step:
    """One thread of each warp, the first."""
    site.need("sync")
    _everybody(site, site.operands[1])
    targets = [name.strip() for name in site.operands[0].split("|")]
    write, flag = site.sink(targets[0], "b32"), site.sink(targets[1], "pred")
    machine = site.machine
    first = machine.everyone % 32 == 0

    def run(m: Mask) -> None:
        machine.warps_of(m)
        write(0, m)
        flag(first, m)

    return run


def _warp_barrier(site: Site) -> Step:
    """bar.warp.sync: the threads of a warp run together here anyway."""
    site.need("warp")
    site.need("sync")
    _everybody(site, site.operands[0])
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


BUILDERS: dict[str, Callable[[Site], Step]] = {
    "shfl": _shuffle,
    "vote": _vote,
    "activemask": _active_mask,
    "elect": _elect,
    "bar": _warp_barrier,
    "membar": _memory_barrier,
    "fence": _fence,
}
