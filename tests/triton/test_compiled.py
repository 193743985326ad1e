"""The kernels' machine code for GPUs that are not here: no spills, no float64, tensor cores, instruction counts.

Counts are ceilings to keep, not measurements of speed. A loop is per thread and per tile of the default configuration.
"""

import re
from functools import cache

import pytest
import torch

from swat_flex.backends.triton.config import TritonConfig
from swat_flex.problem import Problem
from swat_flex.window import Window

pytest.importorskip("triton")

import triton

from swat_flex.backends.triton.offline import KERNELS, compile_kernel
from swat_flex.inspection import inspect_kernel

OLD = triton.__version__ < "3.7"  # whose code spills a register or two more, outside the interior loops
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "MMA", "gfx942": "MFMA"}


def problem(head_dim=64, dtype=torch.bfloat16, group=1, **changes):
    given = {
        "batch": 2,
        "q_heads": 8 * group,
        "kv_heads": 8,
        "q_len": 8192,
        "kv_len": 8192,
        "head_dim": head_dim,
        "value_dim": head_dim,
        "dtype": dtype,
        "device": torch.device("cuda"),
        "window": Window.of(1024),
        "activation": "sigmoid",
        "has_slopes": True,
        "has_logit_bias": False,
        "has_documents": False,
        "needs_grad": True,
    }
    return Problem(**given | changes)


@cache
def inspected(name, target="sm_90", config=None, per_head=False, **changes):
    return inspect_kernel(compile_kernel(name, problem(**changes), target, config=config, per_head=per_head))


def interior(found):
    """The loop without mask arithmetic: of those that multiply on tensor cores the one that compares least."""
    loops = [loop for loop in found.loops if loop.counts.get("tensor core")]
    assert len(loops) == 2  # edges, interior
    return min(loops, key=lambda loop: loop.counts["predicate"])


def special_functions(loop):
    return sum(loop.counts.get(name, 0) for name in ("EX2", "RCP", "TANH", "LG2", "other MUFU"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_default_kernels_use_tensor_cores_and_no_float64(name, head_dim, target):
    found = inspected(name, target, head_dim=head_dim)
    assert not found.has_float64
    opcodes = {i.opcode.upper() for i in found.tensor_core_instructions}
    assert any(TENSOR_CORES[target] in opcode for opcode in opcodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_default_kernels_keep_everything_in_registers(name, head_dim, dtype):
    found = inspected(name, head_dim=head_dim, dtype=dtype)
    assert not {"LDL", "STL"} & set(interior(found).counts)
    assert not found.local_memory_instructions


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_the_other_generations_spill_nothing(name, head_dim, target):
    found = inspected(name, target, head_dim=head_dim)
    assert not {"LDL", "STL"} & set(interior(found).counts)
    assert OLD or not found.local_memory_instructions


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_grouped_heads_and_per_head_gradients_spill_outside_the_interior_at_most(name, head_dim):
    found = inspected(name, head_dim=head_dim, group=4, per_head=True)
    assert not {"LDL", "STL"} & set(interior(found).counts)
    assert len(found.local_memory_instructions) <= {64: 8, 128: 12}[head_dim]


CEILINGS = [
    # kernel, head dimension, activation, configuration, instructions of the interior loop, special functions per score
    ("forward", 64, "sigmoid", TritonConfig(64, 64, 4, 3, pair="queries"), 620, 1.25),
    ("forward", 64, "tanh-sigmoid", TritonConfig(64, 64, 4, 3, pair="queries"), 440, 1.0),
    ("forward", 128, "sigmoid", TritonConfig(128, 64, 8, 2, pair="keys"), 700, 1.25),
    ("forward", 128, "tanh-sigmoid", TritonConfig(128, 64, 8, 2, pair="keys"), 520, 1.0),
    ("forward", 128, "sigmoid", TritonConfig(128, 64, 8, 2), 370, 1.25),
    ("forward", 128, "tanh-sigmoid", TritonConfig(128, 64, 8, 2), 305, 1.0),
    ("query_gradient", 64, "sigmoid", TritonConfig(128, 64, 8, 3), 430, 1.25),
    ("query_gradient", 128, "sigmoid", TritonConfig(128, 64, 8, 2), 480, 1.25),
    ("key_gradients", 64, "sigmoid", TritonConfig(64, 128, 8, 2), 450, 1.25),
    ("key_gradients", 128, "sigmoid", TritonConfig(32, 128, 8, 2), 320, 1.25),
]


@pytest.mark.parametrize(("name", "head_dim", "activation", "config", "ceiling", "per_score"), CEILINGS)
def test_the_interior_loop_stays_below_its_ceiling(name, head_dim, activation, config, ceiling, per_score):
    loop = interior(inspected(name, head_dim=head_dim, activation=activation, config=config))
    scores = config.tiles * config.block_m * config.block_n / (32 * config.warps)
    print(f"{name} D={head_dim} {activation}: {len(loop.instructions)} instructions, ceiling {ceiling}")
    assert len(loop.instructions) <= ceiling
    assert special_functions(loop) == per_score * scores


@pytest.mark.parametrize("name", KERNELS)
def test_multiplications_and_additions_are_fused_whatever_the_default(name, monkeypatch):
    expected = compile_kernel(name, problem(), "sm_90").asm["ptx"]
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    assert compile_kernel(name, problem(), "sm_90").asm["ptx"] == expected


@pytest.mark.parametrize("name", KERNELS)
def test_the_interior_loop_compares_nothing(name):
    """No mask arithmetic: what is left of comparisons is the loop's own, while the edges compare every score."""
    found = inspected(name)
    inside = interior(found)
    for loop in found.loops:
        compared = sum("SETP" in i.opcode for i in loop.instructions)
        assert compared <= 8 if loop is inside else loop.counts["predicate"] >= 128


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(1, torch.bfloat16), (80, torch.bfloat16), (256, torch.bfloat16), (40, torch.float32)]
)
@pytest.mark.parametrize("name", KERNELS)
def test_other_head_dimensions_compile(name, head_dim, dtype):
    found = inspected(name, head_dim=head_dim, dtype=dtype, window=Window.of((64, 3)), has_documents=True)
    assert not found.has_float64
    assert found.occupancy.blocks >= 1


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_products_run_while_weights_are_computed(name, head_dim, group):
    """Most special functions lie between the start of a product and the next wait for one.

    And no product is waited for by itself: ptxas serialises every wgmma of a kernel whose accumulator it finds defined
    between two of them.
    """
    covered, running, waits = 0, False, 0
    loop = interior(inspected(name, head_dim=head_dim, group=group))
    for opcode in (i.opcode for i in loop.instructions):
        waits += opcode.startswith("WARPGROUP.DEPBAR")
        running = opcode.startswith("HGMMA") or (running and not opcode.startswith("WARPGROUP.DEPBAR"))
        covered += running and opcode.startswith("MUFU")
    print(f"{name} D={head_dim} group {group}: {covered} of {special_functions(loop)}, {waits} waits")
    assert covered >= 0.6 * special_functions(loop)
    assert waits <= 3


DESCRIBED = [
    # as CEILINGS, and the registers per thread: addresses need none
    ("forward", 64, TritonConfig(64, 64, 4, 3, True, pair="queries"), 610, 225),
    ("forward", 128, TritonConfig(128, 64, 8, 2, True), 360, 170),
    ("query_gradient", 64, TritonConfig(128, 64, 8, 3, True), 440, 165),
    ("query_gradient", 128, TritonConfig(128, 64, 8, 2, True), 480, 235),
    ("key_gradients", 64, TritonConfig(64, 128, 8, 2, True), 470, 210),
    ("key_gradients", 128, TritonConfig(32, 128, 8, 2, True), 325, 240),
]


@pytest.mark.parametrize(("name", "head_dim", "config", "ceiling", "registers"), DESCRIBED)
def test_descriptors_load_by_the_accelerator_and_free_registers(name, head_dim, config, ceiling, registers):
    found = inspected(name, head_dim=head_dim, config=config)
    loop = interior(found)
    print(f"{name} D={head_dim}: {len(loop.instructions)} instructions, {found.resources.registers} registers")
    assert any(i.opcode.startswith("UTMALDG") for i in loop.instructions)
    assert not any(i.opcode.startswith("LDGSTS") for i in found.instructions)
    assert not found.local_memory_instructions
    assert len(loop.instructions) <= (1.05 if OLD else 1) * ceiling
    assert found.resources.registers <= (1.1 if OLD else 1) * registers


@pytest.mark.parametrize("name", KERNELS)
def test_descriptors_compile_for_blackwell(name):
    config = TritonConfig(64, 64, 4, 2, True)
    assert any(i.opcode.startswith("UTMALDG") for i in inspected(name, "sm_100", config=config).instructions)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_blackwell_specialises_the_forwards_warps(head_dim):
    """Loads, products and σ in warps of their own, which hand registers to each other."""
    found = inspected("forward", "sm_100", head_dim=head_dim, config=TritonConfig(128, 64, 4, 2, True, True))
    opcodes = {i.opcode.split(".")[0] for i in found.instructions}
    assert {"USETMAXREG", "UTMALDG", "UTCHMMA"} <= opcodes
    weighing = [loop for loop in found.loops if special_functions(loop)]
    assert min(len(loop.instructions) for loop in weighing) <= 560  # 671 where the same warps load and multiply
    assert not any({"LDL", "STL"} & set(loop.counts) for loop in found.loops)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("name", KERNELS)
def test_four_sigmoids_that_share_a_reciprocal_lie_in_one_row(name, target):
    """The packed assembly counts on the order in which a thread holds a tile: see sigmoid.py."""
    layouts = packed_layouts(compile_kernel(name, problem(), target).asm["ttgir"])
    assert layouts
    for layout in layouts:
        if "nvidia_mma" in layout:  # a thread's registers: 2 columns, 2 rows, then columns again
            assert re.search(r"versionMajor = [23]", layout)
        else:
            registers = [[int(x) for x in base] for base in re.findall(r"\[(\d+), (\d+)\]", layout.split("lane")[0])]
            assert registers[0][0] == registers[2][0] == 0  # elements 0, 1, 4, 5 of eight


def packed_layouts(ttgir):
    """The layouts on which assembly for eight elements runs."""
    named = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    used = re.findall(r"packed_element = 8 : i32.*?-> tensor<[^#]*(#\w+)>", ttgir)
    return [named[name] for name in used]
