"""Real kernels compiled for every target, without a GPU: what is read agrees with what is worked out by hand."""

import re

import pytest

pytest.importorskip("triton", reason="needs triton, which is built for Linux alone")

from inspection_kernels import attend_kernel, not_a_kernel, scale_kernel, tuned_kernel

from swat_flex.inspection import TARGETS, compile_for, inspect_kernel, predict
from swat_flex.inspection.bound import tensor_work

BM, BN, D, WARPS = 128, 64, 64, 4
ATTEND = ["*bf16", "*bf16", "*bf16", "*bf16", "i32", "fp32"]
TILE = {"BM": BM, "BN": BN}
ORDINARY = ("sm_80", "sm_90", "sm_100", "gfx942")
ALL = [pytest.param(name, marks=() if name in ORDINARY else pytest.mark.slow) for name in TARGETS]


@pytest.fixture(scope="module")
def attend():
    """The attention loop, inspected for each target once."""
    found = {}

    def inspect(target):
        if target not in found:
            found[target] = inspect_kernel(attend_kernel, ATTEND, TILE, target, num_warps=WARPS, num_stages=2)
        return found[target]

    return inspect


@pytest.mark.parametrize("target", ALL)
def test_resources_and_mix(attend, target):
    found = attend(target)
    assert (found.name, found.target.name, found.warps) == ("attend_kernel", target, WARPS)
    assert found.local_memory_instructions == ()
    assert (found.resources.local_loads, found.resources.local_stores, found.resources.stack) == (0, 0, 0)
    # The sums alone, [BM, D] in float32, take BM·D / threads registers.
    assert BM * D / (WARPS * found.target.warp_size) < found.resources.registers <= 256
    assert found.resources.shared >= (BN * D * 2 if target != "gfx942" else 0)
    assert found.occupancy.blocks >= 1
    assert not found.has_float64
    (loop,) = found.loops
    assert loop.counts["EX2"] == BM * BN / (WARPS * found.target.warp_size)


@pytest.mark.parametrize("target", ALL)
def test_tensor_work_is_that_of_two_matmuls(attend, target):
    """Every target has its own instruction and its own way to name a shape; the work is the same."""
    (loop,) = attend(target).loops
    work = [tensor_work(i, WARPS) for i in loop.instructions if i.kind == "tensor core"]
    assert {operands for operands, _ in work} == {"16-bit"}
    assert sum(flops for _, flops in work) == 2 * BM * BN * (D + D)


@pytest.mark.parametrize(
    ("target", "opcode"),
    [
        ("sm_80", "HMMA"),
        ("sm_90", "HGMMA"),
        ("sm_100", "UTCHMMA"),
        pytest.param("sm_120", "HMMA", marks=pytest.mark.slow),
        ("gfx942", "v_mfma"),
    ],
)
def test_tensor_cores_are_used(attend, target, opcode):
    found = attend(target).tensor_core_instructions
    assert found
    assert all(i.opcode.startswith(opcode) for i in found)


def test_occupancy_on_amd_is_what_llvm_says():
    kernel = compile_for(attend_kernel, ATTEND, TILE, "gfx942", num_warps=WARPS, num_stages=2)
    waves_per_simd = int(re.search(r"; Occupancy: (\d+)", kernel.asm["amdgcn"])[1])
    found = inspect_kernel(kernel)
    assert found.occupancy.limits["registers"] * WARPS / 4 == waves_per_simd
    assert found.resources.scalar_registers > 0


def test_a_compiled_kernel_needs_no_arguments(attend):
    kernel = compile_for(attend_kernel, ATTEND, TILE, "sm_90", num_warps=WARPS, num_stages=2)
    assert inspect_kernel(kernel) == attend("sm_90")


def test_spills_are_found(attend):
    found = inspect_kernel(attend_kernel, ATTEND, TILE, "sm_90", num_warps=WARPS, num_stages=2, maxnreg=64)
    assert found.resources.registers == 64
    assert found.resources.stack > 0
    assert found.resources.local_stores > 0
    held = found.resources
    assert len(found.local_memory_instructions) == held.local_loads + held.local_stores
    assert any("LDL" in loop.counts for loop in found.loops)
    assert found.occupancy.blocks > attend("sm_90").occupancy.blocks


@pytest.mark.parametrize("target", ALL)
def test_float64_is_found(target):
    signature = {"x": "*fp32", "out": "*fp32", "n": "i32", "scale": "fp64"}
    found = inspect_kernel(scale_kernel, signature, {"B": 1024}, target)
    assert found.has_float64
    assert found.loops == ()
    assert found.tensor_core_instructions == ()
    assert not inspect_kernel(scale_kernel, signature | {"scale": "fp32"}, {"B": 1024}, target).has_float64


def test_alignment_widens_loads():
    """Pointers are aligned as torch's are; `:1` takes that back, and n decides about the mask."""

    def widest(signature):
        found = inspect_kernel(scale_kernel, signature, {"B": 1024}, "sm_90")
        return {i.opcode for i in found.instructions if i.kind == "LDG"}

    assert widest(["*fp32", "*fp32", "i32:16", "fp32"]) == {"LDG.E.128"}
    assert widest(["*fp32:1", "*fp32:1", "i32:16", "fp32"]) == {"LDG.E"}


def test_the_bound_of_a_real_loop(attend):
    found = attend("sm_100")
    prediction = predict(found.loops[0], found.warps, found.target)
    assert prediction.clocks["tensor cores"] == 2 * BM * BN * (D + D) / 8192
    assert prediction.clocks["special functions"] == BM * BN / 16
    assert prediction.bound == "special functions"


def test_an_autotuned_kernel_is_unwrapped():
    assert inspect_kernel(tuned_kernel, ["*fp32", "*fp32", "i32"], {"B": 256}, "sm_90").name == "tuned_kernel"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((attend_kernel, ATTEND, TILE, "sm_70"), {}, "target: expected one of sm_80, .*, got 'sm_70'"),
        ((attend_kernel, ATTEND, TILE), {}, "target: expected one of sm_80, .*, got None"),
        ((attend_kernel, ATTEND[1:], TILE, "sm_90"), {}, "signature: expected types for q, k, v, out, L, scale, got"),
        ((attend_kernel, ["*bf16:8", *ATTEND[1:]], TILE, "sm_90"), {}, "signature: expected no divisor, .* for q, got"),
        ((attend_kernel, ATTEND, {"BM": 64}, "sm_90"), {}, "constexprs: expected a value for BN, got {'BM': 64}"),
        ((attend_kernel, ATTEND, {"BK": 64}, "sm_90"), {}, "constexprs: expected names among q, .*, got 'BK'"),
        ((attend_kernel, ATTEND, TILE, "sm_90"), {"warps": 4}, "options: expected names that Triton knows .*'warps'"),
        ((attend_kernel, ATTEND, TILE, "gfx942"), {"maxnreg": 64}, "options: expected names .* gfx942, got 'maxnreg'"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        inspect_kernel(*arguments, **options)


def test_what_is_no_kernel_is_refused():
    with pytest.raises(TypeError, match=r"kernel: expected a triton\.jit function, got int"):
        inspect_kernel(not_a_kernel, [], {}, "sm_90")
