"""The kernels' machine code for GPUs that are not here: one test for each compiled kernel, with all that it must show.

Counts are ceilings to keep, not measurements of speed. A loop is per thread and per tile of the configuration.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from sampling import sampled

from swat_flex.backends.triton.config import (
    KERNELS,
    VALUES,
    TritonConfig,
    configurations,
    promising,
    runs_on,
    shares_reciprocals,
)
from swat_flex.problem import Problem
from swat_flex.window import Window

pytest.importorskip("triton")

import triton

from swat_flex.backends.triton.offline import compile_kernel
from swat_flex.inspection import inspect_kernel, undefined_registers

TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
OLD = TRITON < (3, 7)  # whose code spills a register or two more, outside the interior loops
FENCED = TRITON >= (3, 9)  # which puts a proxy fence, and often a barrier, before every product of a loop
TENSOR_CORES = {"sm_8": "HMMA", "sm_90": "HGMMA", "sm_10": "MMA", "sm_12": "HMMA", "gfx": "MFMA"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def problem(head_dim=64, dtype=BF16, group=1, **changes):
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


@dataclass(frozen=True)
class Kernel:
    """A kernel, compiled for a target with a configuration of its own or the default, and what its code must show.

    ceiling: instructions of the interior loop at most. registers: per thread at most. spills: of the whole kernel at
    most, all outside the interior.
    """

    name: str
    target: str = "sm_90"
    head_dim: int = 64
    dtype: torch.dtype = BF16
    config: TritonConfig | None = None
    per_head: bool = False
    changes: tuple[tuple[str, Any], ...] = ()
    ceiling: int | None = None
    registers: int = 255
    spills: int | None = None

    def __str__(self):
        words = [self.name, self.target, f"D{self.head_dim}", str(self.dtype).removeprefix("torch.")]
        words += [str(value) for _, value in self.changes] + ["per_head"] * self.per_head
        if self.config:
            words += [str(value) for value in dataclasses.astuple(self.config)]
        return "-".join(words)

    def of(self):
        return problem(self.head_dim, self.dtype, **dict(self.changes))

    def compiled(self):
        return compile_kernel(self.name, self.of(), self.target, per_head=self.per_head, config=self.config)

    def tiles(self):
        return self.config or configurations(self.name, self.padded_dim(), self.dtype.itemsize, self.target)[0]

    def padded_dim(self):
        return max(16, 1 << (self.head_dim - 1).bit_length())


def slow(kernel):
    return pytest.param(kernel, marks=pytest.mark.slow, id=str(kernel))


def fast(kernel):
    return pytest.param(kernel, id=str(kernel))


def interior(found):
    """The loop without mask arithmetic: of those that multiply on tensor cores the one that compares least."""
    loops = [loop for loop in found.loops if loop.counts.get("tensor core")]
    assert len(loops) == 2  # edges, interior
    return min(loops, key=lambda loop: loop.counts["predicate"])


def special_functions(loop):
    return sum(loop.counts.get(name, 0) for name in ("EX2", "RCP", "TANH", "LG2", "other MUFU"))


def spilled(loop):
    return loop.counts.get("LDL", 0) + loop.counts.get("STL", 0)


def four_lie_in_one_row(ttgir):
    """Whether the packed assembly finds elements 0, 1, 4, 5 of eight in one row, and 2, 3, 6, 7: see sigmoid.py."""
    named = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    used = re.findall(r"packed_element = 8 : i32.*?-> tensor<(\d+)x(\d+)x[^#]*(#\w+)>", ttgir)
    return all(_steps_along_a_row(named[name], int(columns)) for _, columns, name in used)


def _steps_along_a_row(layout, columns):
    """Whether the lowest and the third bit of the number of a thread's register move along a row alone."""
    if "nvidia_mma" in layout:  # a register's number: 2 columns, 2 rows, then columns of the next instruction, if any
        (major,), (_, beside), shape = (
            [int(n) for n in re.search(rf"{key} = \[?([\d, ]+)", layout)[1].split(",") if n.strip()]
            for key in ("versionMajor", "warpsPerCTA", "instrShape")
        )
        return shape[1] >= 16 if major == 3 else columns >= 16 * beside
    registers = [[int(x) for x in base] for base in re.findall(r"\[(\d+), (\d+)\]", layout.split("lane")[0])]
    return "#ttg.linear" in layout and registers[0][0] == registers[2][0] == 0


def defaults():
    """Every default: by kernel, target, width and dtype."""
    sample = {
        *((name, "sm_90", dim, BF16) for name in KERNELS for dim in (64, 128)),
        ("forward", "sm_100", 64, BF16),
        ("key_gradients", "sm_80", 128, BF16),
        ("query_gradient", "sm_120", 256, BF16),
        ("key_gradients", "gfx942", 64, BF16),
        ("key_gradients", "sm_86", 256, FP32),
    }
    targets = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
    for key in itertools.product(KERNELS, targets, (64, 128, 256), (BF16, FP16, FP32)):
        if key[1] != "gfx942" or key[3] != FP32:
            yield (fast if key in sample else slow)(Kernel(*key, ceiling=CEILINGS.get(key)))


CEILINGS = {
    ("forward", "sm_90", 64, BF16): 620,
    ("forward", "sm_90", 128, BF16): 700,
    ("query_gradient", "sm_90", 64, BF16): 430,
    ("query_gradient", "sm_90", 128, BF16): 480,
    ("key_gradients", "sm_90", 64, BF16): 450,
    ("key_gradients", "sm_90", 128, BF16): 320,
}
TANH, GROUP = (("activation", "tanh-sigmoid"),), (("group", 4),)
OTHERS = [
    fast(Kernel("forward", changes=TANH, ceiling=440)),
    slow(Kernel("forward", head_dim=128, changes=TANH, ceiling=520)),
    slow(Kernel("forward", head_dim=128, config=TritonConfig(128, 64, 8, 2), ceiling=370)),
    slow(Kernel("forward", head_dim=128, config=TritonConfig(128, 64, 8, 2), changes=TANH, ceiling=305)),
    # Descriptors: addresses need no registers.
    fast(Kernel("forward", config=TritonConfig(64, 64, 4, 3, True, pair="queries"), ceiling=610, registers=225)),
    slow(Kernel("forward", head_dim=128, config=TritonConfig(128, 64, 8, 2, True), ceiling=360, registers=170)),
    slow(Kernel("query_gradient", config=TritonConfig(128, 64, 8, 3, True), ceiling=440, registers=165)),
    slow(Kernel("query_gradient", head_dim=128, config=TritonConfig(128, 64, 8, 2, True), ceiling=480, registers=235)),
    slow(Kernel("key_gradients", config=TritonConfig(64, 128, 8, 2, True), ceiling=470, registers=210)),
    slow(Kernel("key_gradients", head_dim=128, config=TritonConfig(32, 128, 8, 2, True), ceiling=325, registers=240)),
    *(slow(Kernel(name, "sm_100", config=TritonConfig(64, 64, 4, 2, True))) for name in KERNELS),
    # Grouped heads, and sums per head beside them, may spill outside the interior.
    fast(Kernel("query_gradient", per_head=True, changes=GROUP, spills=8)),
    slow(Kernel("query_gradient", head_dim=128, per_head=True, changes=GROUP, spills=12)),
    *(slow(Kernel(name, head_dim=64, changes=GROUP, spills=8)) for name in ("forward", "key_gradients")),
    *(slow(Kernel(name, head_dim=128, changes=GROUP, spills=12)) for name in ("forward", "key_gradients")),
]


@pytest.mark.parametrize("kernel", [*defaults(), *OTHERS])
def test_compiled_code_shows_what_it_must(kernel):
    compiled = kernel.compiled()
    found, tiles = inspect_kernel(compiled), kernel.tiles()
    print(f"{kernel}: {[len(loop.instructions) for loop in found.loops]} instructions, {found.resources.registers} "
          f"registers, {found.resources.shared} bytes, {found.occupancy.blocks} blocks")  # fmt: skip
    assert not found.has_float64
    assert found.occupancy.blocks >= 1
    assert not any(spilled(loop) for loop in found.loops if kernel.spills is None)
    assert not undefined_registers(compiled.asm.get("ptx", ""))
    assert four_lie_in_one_row(compiled.asm["ttgir"])
    if kernel.dtype == FP32:
        return
    core = next(core for prefix, core in TENSOR_CORES.items() if kernel.target.startswith(prefix))
    if kernel.head_dim < 256:
        assert any(core in i.opcode.upper() for i in found.tensor_core_instructions)
    assert found.tensor_core_instructions
    if kernel.target == "sm_90" and kernel.head_dim < 256:
        check_hopper(kernel, found, tiles)
    elif kernel.target in ("sm_80", "sm_100") and kernel.head_dim < 256 and kernel.dtype == BF16 and not OLD:
        assert len(found.local_memory_instructions) <= (2 if FENCED else 0)


def check_hopper(kernel, found, tiles):
    """What a tile's loop costs, that it compares nothing, and that its products run while weights are computed."""
    loop = interior(found)
    assert not spilled(loop)
    assert len(found.local_memory_instructions) <= (4 if FENCED else 1) * (kernel.spills or 0)
    assert found.resources.registers <= (1.1 if OLD or FENCED else 1) * kernel.registers
    if kernel.ceiling is not None:
        more = 1.07 if FENCED else 1.05 if OLD and tiles.descriptors else 1
        assert len(loop.instructions) <= more * kernel.ceiling
    scores = tiles.tiles * tiles.block_m * tiles.block_n / (32 * tiles.warps)
    assert special_functions(loop) == (1.0 if kernel.changes == TANH else 1.25) * scores
    if tiles.descriptors:
        assert any(i.opcode.startswith("UTMALDG") for i in loop.instructions)
        assert not any(i.opcode.startswith("LDGSTS") for i in found.instructions)
        return
    # What is left of comparisons is the loop's own, while the edges compare every score.
    for other in found.loops:
        compared = sum("SETP" in i.opcode for i in other.instructions)
        assert compared <= 8 if other is loop else other.counts["predicate"] >= scores
    # Between two barriers of its own each product of dq at D = 64 runs alone: ptxas moves no weight past a barrier.
    alone = FENCED and kernel.name == "query_gradient" and kernel.head_dim == 64
    if not alone and not kernel.per_head and kernel.config is None and kernel.changes != TANH:
        check_overlap(loop)


def check_overlap(loop):
    """Most special functions lie between the start of a product and the next wait for one.

    And no product is waited for by itself: ptxas serialises every wgmma of a kernel whose accumulator it finds defined
    between two of them.
    """
    covered, running, waits = 0, False, 0
    for opcode in (i.opcode for i in loop.instructions):
        waits += opcode.startswith("WARPGROUP.DEPBAR")
        running = opcode.startswith("HGMMA") or (running and not opcode.startswith("WARPGROUP.DEPBAR"))
        covered += running and opcode.startswith("MUFU")
    assert covered >= 0.6 * special_functions(loop)
    assert waits <= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["query_gradient", "key_gradients"])
def test_what_a_search_tries_first_gives_a_multiprocessor_two_blocks(name):
    """At about the instructions per score of the default, which gives it one, and twice the bytes per score."""
    default, offered = Kernel(name), [Kernel(name, config=config) for config in promising(name, 64, 2)]
    assert offered

    def per_score(kernel):
        found, tiles = inspect_kernel(kernel.compiled()), kernel.tiles()
        loop = interior(found)
        assert not spilled(loop)
        return len(loop.instructions) / (tiles.block_m * tiles.block_n / (32 * tiles.warps)), found.occupancy.blocks

    count, blocks = per_score(default)
    assert blocks == 1
    for kernel in offered:
        other, twice = per_score(kernel)
        print(f"{kernel}: {other:.1f} instructions per score, {twice} blocks; the default {count:.1f}")
        assert twice == 2
        assert other <= 1.02 * count


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_blackwell_specialises_the_forwards_warps(head_dim):
    """Loads, products and σ in warps of their own, which hand registers to each other."""
    config = TritonConfig(128, 64, 4, 2, True, True)
    found = inspect_kernel(compile_kernel("forward", problem(head_dim), "sm_100", config=config))
    opcodes = {i.opcode.split(".")[0] for i in found.instructions}
    assert {"USETMAXREG", "UTMALDG", "UTCHMMA"} <= opcodes
    weighing = [loop for loop in found.loops if special_functions(loop)]
    assert min(len(loop.instructions) for loop in weighing) <= 560  # 671 where the same warps load and multiply
    assert not any(spilled(loop) for loop in found.loops)


def widths():
    for head_dim, dtype in ((1, BF16), (80, BF16), (256, BF16), (40, FP32)):
        for name in KERNELS:
            marks = () if (name, head_dim) == ("key_gradients", 80) else pytest.mark.slow
            yield pytest.param(name, head_dim, dtype, marks=marks)


@pytest.mark.parametrize(("name", "head_dim", "dtype"), list(widths()))
def test_other_head_dimensions_compile(name, head_dim, dtype):
    of = problem(head_dim, dtype, window=Window.of((64, 3)), has_documents=True)
    found = inspect_kernel(compile_kernel(name, of, "sm_90"))
    assert not found.has_float64
    assert found.occupancy.blocks >= 1


@pytest.mark.parametrize("name", sampled(KERNELS, 3))
def test_multiplications_and_additions_are_fused_whatever_the_default(name, monkeypatch):
    expected = compile_kernel(name, problem(), "sm_90").asm["ptx"]
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    assert compile_kernel(name, problem(), "sm_90").asm["ptx"] == expected


FEW = [  # fewer than eight scores to a thread
    ("query_gradient", "sm_80", 32, TritonConfig(16, 16, 4, 4)),
    ("key_gradients", "sm_90", 128, TritonConfig(64, 16, 16, 1)),
    ("forward", "sm_80", 128, TritonConfig(16, 32, 4, 2)),
]


@pytest.mark.parametrize(("name", "target", "head_dim", "config"), sampled(FEW, 3))
def test_a_thread_with_few_scores_reads_no_undefined_register(name, target, head_dim, config):
    """Triton pads what a packed piece of assembly lacks with registers that nothing writes."""
    assert config.is_valid()
    assert not shares_reciprocals(name, config, head_dim, target)
    assert not undefined_registers(compile_kernel(name, problem(head_dim), target, config=config).asm["ptx"])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_shared_reciprocals_stay_in_one_row_whatever_the_tiles(target):
    """Thirty valid configurations drawn from all that share, whose layouts Triton chooses as it likes."""
    everything = itertools.product(*VALUES.values())
    valid = [c for c in itertools.starmap(TritonConfig, everything) if c.is_valid() and not c.warp_specialize]
    small = [c for c in valid if c.stages == 1 and max(c.block_m, c.block_n) <= 128]
    kinds = [(name, dim, c) for name, dim, c in itertools.product(KERNELS, (64, 128, 256), small)
             if runs_on(name, c, target) and shares_reciprocals(name, c, dim, target)]  # fmt: skip
    for i in torch.randperm(len(kinds))[:30].tolist():
        name, dim, config = kinds[i]
        assert four_lie_in_one_row(compile_kernel(name, problem(dim), target, config=config).asm["ttgir"]), kinds[i]
