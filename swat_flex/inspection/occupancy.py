"""How many blocks of a kernel a multiprocessor holds at once, and what stops the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from swat_flex.inspection.targets import Target

SCHEDULERS = 4  # of a multiprocessor, each with a quarter of the registers and of the resident warps
SHARED_STEP = 128  # bytes; shared memory is allocated in multiples


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        registers: 32-bit registers per thread; on AMD vector and accumulation registers together.
        scalar_registers: per warp, on AMD; None elsewhere.
        local_loads: instructions that read thread-local memory: spilled registers, as Triton has no local arrays.
        local_stores: instructions that write it.
        stack: bytes of thread-local memory per thread.
        shared: bytes of shared memory per block.
        tensor_memory: columns of tensor memory per block.
    """

    registers: int
    scalar_registers: int | None
    local_loads: int
    local_stores: int
    stack: int
    shared: int
    tensor_memory: int = 0


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Resident blocks and warps of one multiprocessor.

    Attributes:
        blocks: resident blocks; 0 when not even one fits.
        warps: resident warps.
        limits: the blocks that each resource would allow on its own.
        limited_by: the scarcest resources.
    """

    blocks: int
    warps: int
    limits: Mapping[str, int]

    @property
    def limited_by(self) -> tuple[str, ...]:
        return tuple(name for name, blocks in self.limits.items() if blocks == self.blocks)


def occupancy(resources: Resources, warps: int, target: Target) -> Occupancy:
    """Count how many blocks of `warps` warps with these resources fit on one multiprocessor of `target`."""
    per_warp = _round_up(max(resources.registers, 1), target.register_step) * target.warp_size
    per_scheduler = target.registers // SCHEDULERS // per_warp
    limits = {"registers": per_scheduler * SCHEDULERS // warps}
    shared = _round_up(resources.shared + target.shared_reserved, SHARED_STEP)
    if shared:
        limits["shared memory"] = target.shared // shared
    if resources.tensor_memory:
        limits["tensor memory"] = target.tensor_memory // resources.tensor_memory
    limits["threads"] = target.max_warps // warps
    limits["blocks"] = target.max_blocks
    blocks = min(limits.values())
    return Occupancy(blocks, blocks * warps, limits)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
