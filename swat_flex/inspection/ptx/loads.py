"""Loads, stores and atomic additions."""

from __future__ import annotations

import numpy as np

from swat_flex.inspection.ptx.faults import Fault
from swat_flex.inspection.ptx.formats import RAW, TYPES, Mask, width
from swat_flex.inspection.ptx.site import Builder, Site, Step

# How long caches should keep what is touched, and who sees it when; neither changes a result here.
_HINTS = (
    "L1:evict_last", "L1:evict_first", "L1:no_allocate", "L2:cache_hint", "L2:128B", "L2:256B", "weak", "relaxed",
    "gpu", "cta", "sys", "volatile", "nc",
)  # fmt: skip
SHARED = ("shared", "shared:cta")


def _take_hints(site: Site) -> None:
    while site.take(*_HINTS):
        pass


def _elements(site: Site, text: str) -> list[str]:
    """Take the modifiers of a load or store, and return the elements of its vector, which they count."""
    _take_hints(site)
    count, names = int((site.take("v2", "v4", "v8") or "v1")[1]), site.vector(text)
    if count != len(names):
        raise Fault(f"expects {count} registers")
    return names


def _load(site: Site) -> Step:
    kind, space = site.kind(), site.need("param", "global", *SHARED)
    if kind[0] != "s":
        kind = f"b{8 * width(kind)}"  # bits as they are
    if space == "param":
        return _load_parameter(site, kind)
    names = _elements(site, site.operands[0])
    machine, size = site.machine, width(kind) * len(names)
    writes, at = [site.wide_sink(name, kind) for name in names], site.address(site.operands[1])

    def run(m: Mask) -> None:
        lanes = machine.lanes_of(m)
        address = at(None if m is None else lanes)
        memory = machine.memory if space == "global" else machine.shared
        found = memory.read(address, size, lanes).view(TYPES[kind])
        for write, value in zip(writes, found.T, strict=True):
            write(machine.spread(value, m), m)

    return run


def _load_parameter(site: Site, kind: str) -> Step:
    name = site.operands[1].strip("[] ")
    machine, write = site.machine, site.wide_sink(site.operands[0], kind)
    if name not in machine.arguments:
        raise Fault(f"loads a parameter that is not known: {name}")
    return lambda m: write(machine.arguments[name].view(TYPES[kind])[:1], m)


def _store(site: Site) -> Step:
    kind, space = site.kind(), site.need("global", *SHARED)
    names = _elements(site, site.operands[1])
    values = [site.register(x) if x in site.instruction.scope else site.source(x, kind) for x in names]
    if any(x.itemsize < width(kind) for x in values):
        raise Fault(f"takes a register of less than {8 * width(kind)} bits")
    machine, at, raw = site.machine, site.address(site.operands[0]), RAW[width(kind)]

    def run(m: Mask) -> None:
        lanes = machine.lanes_of(m)
        pieces = [x.view(RAW[x.itemsize]) if m is None else x.view(RAW[x.itemsize])[lanes] for x in values]
        found = np.stack([x.astype(raw) for x in pieces], 1).view(np.uint8)
        memory = machine.memory if space == "global" else machine.shared
        memory.write(at(None if m is None else lanes), found, lanes)

    return run


def _add_atomically(site: Site) -> Step:
    """atom and red, which returns nothing. Additions run in the order of the threads; hardware promises none."""
    kind = site.kind("f32", "u32", "s32", "u64")
    site.need("global")
    site.take("acq_rel")
    _take_hints(site)
    site.need("add")
    site.take("v2", "v4")
    returns = site.name == "atom"
    to, *rest = site.operands if returns else ("_", *site.operands)
    at, values = site.address(rest[0]), [site.source(x, kind) for x in site.vector(rest[1])]
    writes = [site.sink(x, kind) for x in site.vector(to)] if returns else []
    machine = site.machine

    def run(m: Mask) -> None:
        lanes = machine.lanes_of(m)
        address = at(lanes)
        for n, x in enumerate(values):
            old = machine.memory.update(address + n * x.itemsize, x[lanes], lanes)
            if returns:
                writes[n](machine.spread(old, m), m)

    return run


def _create_policy(site: Site) -> Step:
    """createpolicy.fractional: how long the second-level cache should keep something; any number will do."""
    site.kind("b64")
    site.need("fractional")
    site.need("L2:evict_last", "L2:evict_first", "L2:evict_normal", "L2:evict_unchanged")
    return site.computed(lambda: 0, "b64")


BUILDERS: dict[str, Builder] = {
    "createpolicy": _create_policy,
    "ld": _load,
    "st": _store,
    "atom": _add_atomically,
    "red": _add_atomically,
}
