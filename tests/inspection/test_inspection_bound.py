"""Occupancy and the static bound, against numbers worked out by hand."""

import pytest

from swat_flex.inspection import (
    GPUS,
    TARGETS,
    Instruction,
    Loop,
    Resources,
    gpu_named,
    occupancy,
    predict,
    target_named,
)


def resources(registers, shared=0, tensor_memory=0):
    return Resources(registers, None, 0, 0, 0, shared, tensor_memory)


def mix(**counts):
    """A loop with so many instructions of each opcode; two underscores stand for a dot."""
    kinds = {
        **{"MUFU__EX2": "EX2", "MUFU__RCP": "RCP", "HGMMA__64x64x16__F32__BF16": "tensor core", "FFMA": "FFMA"},
        **{"FFMA2": "FF2", "DFMA": "float64", "IADD3": "integer", "IMMA__16832__S8__S8": "tensor core"},
    }
    opcodes = [name for name, count in counts.items() for _ in range(count)]
    code = [Instruction(16 * i, name.replace("__", "."), "", kinds[name]) for i, name in enumerate(opcodes)]
    return Loop(0, code[-1].address, tuple(code))


@pytest.mark.parametrize(
    ("target", "warps", "held", "blocks", "limited_by"),
    [
        # 188 registers round up to 192; ×32 = 6144 per warp; 16384 // 6144 = 2 warps per scheduler; 8 warps
        ("sm_90", 4, resources(188, 40960), 2, ("registers",)),
        # 100 KiB + 1 KiB reserved; 228 // 101
        ("sm_90", 8, resources(32, 100 * 1024), 2, ("shared memory",)),
        # 32 registers: 16 warps per scheduler, as many as there is room for
        ("sm_90", 8, resources(32), 8, ("registers", "threads")),
        ("sm_90", 1, resources(16), 32, ("blocks",)),
        ("sm_90", 4, resources(64, 228 * 1024), 0, ("shared memory",)),
        # 164 // 65
        ("sm_80", 4, resources(64, 64 * 1024), 2, ("shared memory",)),
        ("sm_100", 4, resources(90, 49184, tensor_memory=256), 2, ("tensor memory",)),
        ("sm_120", 4, resources(24), 12, ("threads",)),
        # 134 round up to 136; ×64 = 8704; 32768 // 8704 = 3 waves per SIMD; 12 waves
        ("gfx942", 4, resources(134, 16384), 3, ("registers",)),
        ("gfx942", 4, resources(64, 40 * 1024), 1, ("shared memory",)),
    ],
)
def test_occupancy(target, warps, held, blocks, limited_by):
    fits = occupancy(held, warps, target_named(target))
    assert (fits.blocks, fits.warps, fits.limited_by) == (blocks, blocks * warps, limited_by)


def test_special_functions_bound_a_sigmoid_tile_on_hopper():
    """A 128 × 64 tile at head dimension 64 with 4 warps, as a sigmoid of one EX2 per pair and half an RCP."""
    loop = mix(HGMMA__64x64x16__F32__BF16=16, MUFU__EX2=64, MUFU__RCP=32, FFMA=128, IADD3=378)
    flops = 2 * 128 * 64 * (64 + 64)
    prediction = predict(loop, 4, TARGETS["sm_90"], gpu=GPUS["H100"], flops=flops)
    assert prediction.clocks == {
        "tensor cores": flops / 4096,  # 512
        "special functions": (64 + 32) * 4 * 32 / 16,  # 768
        "float32": 128 * 4 * 32 / 128,
        "issue": 618 * 4 / 4,
    }
    assert prediction.bound == "special functions"
    assert prediction.unknown == {}
    assert prediction.tflops == pytest.approx(flops * 132 * 1.83e9 / 768 / 1e12)


def test_memory_bounds_where_bytes_are_many():
    loop = mix(HGMMA__64x64x16__F32__BF16=1)
    prediction = predict(loop, 4, TARGETS["sm_90"], gpu=GPUS["H200"], flops=1e6, bytes_moved=1e5)
    assert prediction.bound == "memory"
    # All multiprocessors together move 4.8e12 bytes/s: 1e6 FLOP for every 1e5 bytes.
    assert prediction.tflops == pytest.approx(10 * 4.8)


def test_packed_and_double_arithmetic_have_their_own_rates():
    prediction = predict(mix(FFMA2=10, FFMA=4, DFMA=3), 8, TARGETS["sm_120"])
    assert prediction.clocks == {
        "float32": (2 * 10 + 4) * 8 * 32 / 128,
        "float64": 3 * 8 * 32 / 2,
        "issue": 17 * 8 / 4,
    }
    assert prediction.bound == "float64"
    assert prediction.tflops is None


def test_an_unknown_rate_is_said_not_guessed():
    prediction = predict(mix(FFMA=8, MUFU__EX2=1), 4, TARGETS["gfx942"])
    assert prediction.clocks == {"special functions": 4 * 64 / 16}
    assert set(prediction.unknown) == {"float32", "issue"}
    integer = predict(mix(IMMA__16832__S8__S8=1, IADD3=1), 4, TARGETS["sm_80"])
    assert integer.bound == "issue"
    assert "IMMA.16832.S8.S8" in integer.unknown["tensor cores"]


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("A100", 312),
        ("A10", 125),
        ("L40S", 362),
        ("H100", 989),
        ("H200", 989),
        ("B200", 2250),
        ("RTX 5090", 209.5),
        ("MI300X", 1307),
    ],
)
def test_rates_and_clocks_make_the_published_peak(name, tflops):
    gpu = GPUS[name]
    peak = gpu.multiprocessors * gpu.clock * TARGETS[gpu.target].rates.tensor["16-bit"] / 1e12
    assert peak == pytest.approx(tflops, rel=1e-3)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"target: expected one of sm_80, .*, got 'sm_70'"):
        target_named("sm_70")
    with pytest.raises(ValueError, match=r"gpu: expected a GPU of sm_90 \(H100, H200\), got 'A100'"):
        gpu_named("A100", target_named("sm_90"))
