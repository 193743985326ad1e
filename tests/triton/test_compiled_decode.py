"""The decode kernel's machine code for GPUs that are not here: no spills, no float64, wide loads, instruction counts.

Counts are ceilings to keep, not measurements of speed.
"""

from functools import cache

import pytest
import torch
from sampling import sampled

from swat_flex.problem import Problem
from swat_flex.window import Window

pytest.importorskip("triton")

from swat_flex.backends.triton.config import DecodeConfig, decode_configurations
from swat_flex.backends.triton.offline import compile_decode, offline_configuration
from swat_flex.inspection import gpu_named, inspect_kernel, predict, target_named

TARGETS = ["sm_90", "sm_80", "sm_100", "gfx942"]


def problem(head_dim=64, dtype=torch.bfloat16, group=1, tokens=1, **changes):
    given = {
        "batch": 1,
        "q_heads": 8 * group,
        "kv_heads": 8,
        "q_len": tokens,
        "kv_len": 1024,
        "head_dim": head_dim,
        "value_dim": head_dim,
        "dtype": dtype,
        "device": torch.device("cuda"),
        "window": Window.of(1024),
        "activation": "sigmoid",
        "has_slopes": True,
        "has_logit_bias": False,
        "has_documents": False,
        "needs_grad": False,
    }
    return Problem(**given | changes)


@cache
def inspected(target="sm_90", **changes):
    return inspect_kernel(compile_decode(problem(**changes), target))


@pytest.mark.parametrize("target", sampled(TARGETS, 3))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_keeps_everything_in_registers_and_multiplies_on_tensor_cores(head_dim, target):
    found = inspected(target, head_dim=head_dim)
    assert not found.local_memory_instructions
    assert not found.has_float64
    assert found.tensor_core_instructions


@pytest.mark.parametrize("target", sampled(TARGETS, 3))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_and_values_arrive_sixteen_bytes_at_a_time(head_dim, target):
    """Straight into shared memory on NVIDIA, tiles ahead of their use."""
    found = inspected(target, head_dim=head_dim)
    (loop,) = found.loops
    loads = [i.opcode for i in loop.instructions if i.kind in ("LDG", "LDGSTS")]
    key_bytes = 2 * head_dim * 2
    copied = offline_configuration(problem(head_dim=head_dim)).block_n * key_bytes
    threads = found.warps * found.target.warp_size
    assert len(loads) * threads * 16 == copied  # each key and value once
    assert all("128" in opcode or opcode.endswith("dwordx4") for opcode in loads)
    assert target.startswith("gfx") or all(opcode.startswith("LDGSTS") for opcode in loads)


CEILINGS = [
    # head dimension, group, new tokens, instructions of the loop per thread and tile of keys (measured 208, 335, 249,
    # 376, 560, 588)
    (64, 1, 1, 235),
    (128, 1, 1, 370),
    (64, 4, 4, 260),
    (128, 4, 4, 395),
    (64, 4, 16, 600),
    (128, 4, 16, 625),
]


@pytest.mark.parametrize(("head_dim", "group", "tokens", "ceiling"), sampled(CEILINGS, 3))
def test_the_loop_stays_below_its_ceiling_and_waits_for_memory(head_dim, group, tokens, ceiling):
    """On an H200, whose memory is the fastest for sm_90; sixteen queries of four heads included."""
    of = problem(head_dim=head_dim, group=group, tokens=tokens)
    found = inspected(head_dim=head_dim, group=group, tokens=tokens)
    (loop,) = found.loops
    print(f"D={head_dim} group={group} T={tokens}: {len(loop.instructions)} instructions, ceiling {ceiling}")
    assert len(loop.instructions) <= ceiling
    assert not found.local_memory_instructions
    copied = offline_configuration(of).block_n * 2 * head_dim * 2
    h200 = gpu_named("H200", target_named("sm_90"))
    assert predict(loop, found.warps, found.target, gpu=h200, bytes_moved=copied).bound == "memory"


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    sampled(
        [(80, torch.float16), (1, torch.bfloat16), (256, torch.bfloat16), (40, torch.float32), (256, torch.float32)], 5
    ),
)
def test_other_head_dimensions_compile(head_dim, dtype):
    found = inspected(head_dim=head_dim, dtype=dtype, group=2, tokens=3, has_logit_bias=True)
    assert not found.has_float64
    assert found.occupancy.blocks >= 1


@pytest.mark.parametrize(
    ("programs", "slots", "splits"),
    [
        (8, 4096, 32),  # one sequence, 8 key heads: two tiles of keys to a program
        (8, 100, 1),
        (8, 65536, 66),  # four programs for each multiprocessor
        (64, 4096, 8),
        (512, 4096, 1),
        (100_000, 4096, 1),
    ],
)
def test_a_small_batch_is_split_until_it_fills_the_device(programs, slots, splits):
    chosen, smallest = decode_configurations(16, 128, 2)
    assert chosen == DecodeConfig(64, 4, 3)
    assert chosen.splits_of(programs, slots, 132) == splits
    assert DecodeConfig(64, 4, 3, 5).splits_of(programs, slots, 132) == 5
    assert (smallest.block_n, smallest.stages) == (16, 1)
