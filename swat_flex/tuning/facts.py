"""Why a configuration of our own kernels is not worth running: facts of its machine code, compiled, not run."""

from __future__ import annotations

from typing import Any

import torch

from swat_flex.backends.triton import DecodeConfig, TritonConfig
from swat_flex.backends.triton.config import runs_on
from swat_flex.backends.triton.offline import compile_decode, compile_kernel
from swat_flex.inspection import TARGETS, inspect_kernel, undefined_registers
from swat_flex.problem import Problem


def of_device(device: torch.device) -> tuple[str, int]:
    """The target of a GPU of this machine, and the bytes of shared memory that one block may use there."""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0], properties.shared_memory_per_block
    return f"sm_{properties.major}{properties.minor}", properties.shared_memory_per_block_optin


def complaint(
    kernel: Any, problem: Problem, config: TritonConfig | DecodeConfig, target: str, shared_limit: int
) -> str | None:
    """A reason to reject, or None: what the target lacks, registers that are read and never written, too much shared
    memory, registers spilled within the loops; half of a decode step's splits without a key.

    Args:
        kernel: "forward", "query_gradient" or "key_gradients"; a DecodeConfig is the decode kernel's.
        target: "sm_90"; one that `swat_flex.inspection` does not know is judged by its shared memory alone.
        shared_limit: bytes of shared memory that a block may use.
    """
    if isinstance(config, DecodeConfig):
        empty = config.empty_splits(problem.kv_len)
        if config.splits is not None and config.splits <= 2 * empty:  # half as many would do the same
            return f"leaves {empty} of {config.splits} splits without a key"
        compiled = compile_decode(problem, target, config=config)
    elif runs_on(kernel, config, target):
        compiled = compile_kernel(kernel, problem, target, config=config)
    else:
        return f"asks for descriptors, warp specialisation or pairs, which {kernel} does not have on {target}"
    if undefined := undefined_registers(compiled.asm.get("ptx", "")):
        more = f" and {len(undefined) - 1} more" if len(undefined) > 1 else ""
        return f"reads {undefined[0]}{more} that nothing writes"
    if compiled.metadata.shared > shared_limit:
        return f"needs {compiled.metadata.shared:,} bytes of shared memory, and a block may use {shared_limit:,}"
    if target not in TARGETS:
        return None
    found = inspect_kernel(compiled)
    spills = max((loop.counts.get("LDL", 0) + loop.counts.get("STL", 0) for loop in found.loops), default=0)
    if spills:
        return f"spills registers within a loop: {spills} loads and stores of local memory per step"
    return None
