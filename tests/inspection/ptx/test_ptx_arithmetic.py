"""Arithmetic of the emulated PTX, from the descriptions in the PTX manual (ISA 8.7, chapter 9.7)."""

import fractions

import numpy as np
import pytest
import torch

pytest.importorskip("numpy")

from handwritten import execute, floats, words

from swat_flex.inspection.ptx import Fault

X = words(1)
SIGNED = X.view(np.int32)
THREAD = np.arange(64, dtype=np.uint32)


def trunc(a, b):
    return np.array([int(fractions.Fraction(int(p), b)) for p in a], np.int64).astype(np.int32).view(np.uint32)


INTEGERS = {
    "add.s32 %r3, %r2, -7;": X - np.uint32(7),
    "sub.s32 %r3, %r1, %r2;": THREAD - X,
    "mul.lo.s32 %r3, %r2, %r2;": X * X,
    "mul.hi.u32 %r3, %r2, 123456789;": (X.astype(np.uint64) * 123456789 >> 32).astype(np.uint32),
    "mul.hi.s32 %r3, %r2, 123456789;": (SIGNED.astype(np.int64) * 123456789 >> 32).astype(np.int32).view(np.uint32),
    "mad.lo.s32 %r3, %r2, 5, %r1;": X * np.uint32(5) + THREAD,
    "mul.wide.s32 %rd6, %r2, -3; cvt.u32.u64 %r3, %rd6;": X * np.uint32(0xFFFFFFFD),
    "mad.wide.s32 %rd6, %r2, 4, %rd1; sub.s64 %rd6, %rd6, %rd1; shr.s64 %rd6, %rd6, 4; cvt.u32.u64 %r3, %rd6;": (
        SIGNED >> 2
    ).view(np.uint32),
    "div.s32 %r3, %r2, -7;": trunc(SIGNED, -7),
    "div.u32 %r3, %r2, 7;": X // np.uint32(7),
    "rem.s32 %r3, %r2, 7;": np.fmod(SIGNED, 7).view(np.uint32),
    "min.s32 %r3, %r2, 5;": np.minimum(SIGNED, 5).view(np.uint32),
    "max.u32 %r3, %r2, 0x80000000;": np.maximum(X, np.uint32(1 << 31)),
    "shl.b32 %r3, %r2, %r1;": np.where(THREAD < 32, X << (THREAD & 31), 0).astype(np.uint32),
    "shr.u32 %r3, %r2, %r1;": np.where(THREAD < 32, X >> (THREAD & 31), 0).astype(np.uint32),
    "shr.s32 %r3, %r2, %r1;": (SIGNED >> np.minimum(THREAD, 31).astype(np.int32)).view(np.uint32),
    "bfe.u32 %r3, %r2, 3, 9;": X >> np.uint32(3) & np.uint32(511),
    "bfe.s32 %r3, %r2, 3, 9;": ((SIGNED << 20) >> 23).view(np.uint32),
    "bfe.s32 %r3, %r2, 28, 9;": (SIGNED >> 28).view(np.uint32),
    "bfe.u32 %r3, %r2, 3, 0;": 0 * X,
    "bfi.b32 %r3, %r1, %r2, 8, 6;": (X & ~np.uint32(0x3F00)) | (THREAD << np.uint32(8)),
    "lop3.b32 %r3, %r2, %r1, 12345, 0xE8;": (X & THREAD) | (X & np.uint32(12345)) | (THREAD & np.uint32(12345)),
    "not.b32 %r3, %r2;": ~X,
    "xor.b32 %r3, %r2, 0x55;": X ^ np.uint32(0x55),
    "popc.b32 %r3, %r2;": np.array([int(n).bit_count() for n in X], np.uint32),
    "clz.b32 %r3, %r1;": np.array([32 - int(n).bit_length() for n in THREAD], np.uint32),
    "mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};": X >> np.uint32(16) | X << np.uint32(16),
    "setp.gt.s32 %p1|%p2, %r2, 0; selp.b32 %r3, 1, 2, %p1; @%p2 add.s32 %r3, %r3, 8;": np.where(
        SIGNED > 0, 1, 10
    ).astype(np.uint32),
    "setp.lt.u32 %p1, %r1, 9; setp.gt.and.s32 %p2, %r2, 0, !%p1; selp.b32 %r3, 1, 0, %p2;": (
        (SIGNED > 0) & (THREAD >= 9)
    ).astype(np.uint32),
    "cvt.s64.s32 %rd6, %r2; shr.u64 %rd6, %rd6, 32; cvt.u32.u64 %r3, %rd6;": (SIGNED >> 31).view(np.uint32),
    "cvt.u16.u32 %rs1, %r2; cvt.s32.s16 %r3, %rs1;": X.astype(np.uint16)
    .view(np.int16)
    .astype(np.int32)
    .view(np.uint32),
    "cvt.sat.s8.s32 %r3, %r2;": np.clip(SIGNED, -128, 127).view(np.uint32),
}


@pytest.mark.parametrize("body", INTEGERS)
def test_integers_and_bits(body):
    found, _ = execute(body, X)
    np.testing.assert_array_equal(found, INTEGERS[body])


def test_prmt_picks_bytes_and_signs():
    found, _ = execute("prmt.b32 %r3, %r2, %r1, 0x4A21;", X)
    pool = np.stack([X, THREAD], 1).view(np.uint8)
    sign = np.where(pool[:, 2] & 128, 255, 0)
    wanted = np.stack([pool[:, 1], pool[:, 2], sign, pool[:, 4]], 1).astype(np.uint8)
    np.testing.assert_array_equal(found, np.ascontiguousarray(wanted).view(np.uint32)[:, 0])


def rounded(exact, mode):
    """float32 of a rational number by search: IEEE 754's definition."""
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    below = max(x for x in around if fractions.Fraction(float(x)) <= exact)
    above = min(x for x in around if fractions.Fraction(float(x)) >= exact)
    if mode == "rm":
        return below
    if mode == "rp":
        return above
    if mode == "rz":
        return below if exact >= 0 else above
    low, high = exact - fractions.Fraction(float(below)), fractions.Fraction(float(above)) - exact
    if low == high:
        return below if below.view(np.uint32) % 2 == 0 else above
    return below if low < high else above


def hard_triples():
    """a, b, c whose a·b + c lies near the middle between two float32, where rounding twice goes wrong."""
    rng = np.random.default_rng(3)
    a = (1 + rng.integers(0, 1 << 23, 64) / 2**23).astype(np.float32)
    b = (1 + rng.integers(0, 1 << 12, 64) / 2**12).astype(np.float32)
    a[:16], b[:16] = np.float32(1 + 2**-12), np.float32(1 + 2**-12)  # 1 + 2⁻¹¹ + 2⁻²⁴: a tie
    c = np.where(np.arange(64) % 2, 1, -1) * 2.0 ** rng.integers(-80, -25, 64)
    return a, b, c.astype(np.float32)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_fma_rounds_once(mode):
    a, b, c = hard_triples()
    body = f"ld.global.b32 %r4, [%rd4+256]; ld.global.b32 %r5, [%rd4+512]; fma.{mode}.f32 %r3, %r2, %r4, %r5;"
    found, _ = execute(body, np.concatenate([a, b, c]))
    exact = [fractions.Fraction(float(p)) * fractions.Fraction(float(q)) + fractions.Fraction(float(r))
             for p, q, r in zip(a, b, c, strict=True)]  # fmt: skip
    np.testing.assert_array_equal(found.view(np.float32), np.array([rounded(x, mode) for x in exact]))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_rounding_modes(name, mode):
    a, b = floats(5), floats(6) * np.float32(1e-6)
    found, _ = execute(f"ld.global.b32 %r4, [%rd4+256]; {name}.{mode}.f32 %r3, %r2, %r4;", np.concatenate([a, b]))
    of = {"add": lambda p, q: p + q, "sub": lambda p, q: p - q, "mul": lambda p, q: p * q}[name]
    exact = [of(fractions.Fraction(float(p)), fractions.Fraction(float(q))) for p, q in zip(a, b, strict=True)]
    np.testing.assert_array_equal(found.view(np.float32), np.array([rounded(x, mode) for x in exact]))


def test_ftz_flushes_what_goes_in_and_out_and_sat_holds_to_one():
    x = np.array([1e-40, -1e-40, 2.0**-126, 3.0, -3.0, np.nan, 0.5, np.inf] * 8, np.float32)
    found, _ = execute("mul.ftz.f32 %r3, %r2, 0f3F800000;", x)
    np.testing.assert_array_equal(found.view(np.float32)[:3], [0, -0.0, 2.0**-126])
    assert np.signbit(found.view(np.float32)[1])
    found, _ = execute("mul.f32 %r3, %r2, 0f3F800000;", x)
    assert found.view(np.float32)[0] == x[0]
    found, _ = execute("mul.ftz.f32 %r3, %r2, 0f3F000000;", x)
    assert found.view(np.float32)[2] == 0
    found, _ = execute("add.sat.f32 %r3, %r2, 0f00000000;", x)
    np.testing.assert_array_equal(found.view(np.float32)[3:8], [1, 0, 0, 0.5, 1])


def test_min_and_max_of_nan_and_zeros():
    x = np.array([np.nan, 1, -0.0, 0.0] * 16, np.float32)
    y = np.array([2, np.nan, 0.0, -0.0] * 16, np.float32)
    both, load = np.concatenate([x, y]), "ld.global.b32 %r4, [%rd4+256];"
    found = {op: execute(f"{load} {op}.f32 %r3, %r2, %r4;", both)[0].view(np.float32)[:4]
             for op in ("min", "max", "min.NaN", "max.NaN")}  # fmt: skip
    np.testing.assert_array_equal(found["min"], [2, 1, 0, 0])
    np.testing.assert_array_equal(np.signbit(found["min"][2:]), [True, True])
    np.testing.assert_array_equal(np.signbit(found["max"][2:]), [False, False])
    assert np.isnan(found["min.NaN"][:2]).all()
    assert np.isnan(found["max.NaN"][:2]).all()


COMPARISONS = {"lt": [0, 0, 1], "ltu": [1, 0, 1], "ne": [0, 0, 1], "neu": [1, 0, 1], "eq": [0, 1, 0], "equ": [1, 1, 0],
               "nan": [1, 0, 0], "num": [0, 1, 1], "ge": [0, 1, 0], "geu": [1, 1, 0]}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_of_floats_know_nan(name):
    x = np.resize(np.array([np.nan, 2, 1], np.float32), 64)
    found, _ = execute(f"setp.{name}.f32 %p1, %r2, 0f40000000; selp.b32 %r3, 1, 0, %p1;", x)
    np.testing.assert_array_equal(found[:3], COMPARISONS[name])


@pytest.mark.parametrize(("name", "of"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_conversion_packs_two_rounded_halves(name, of):
    x = floats(7) * np.float32(100)
    found, _ = execute(f"cvt.rn.{name}.f32 %r3, %r2, 0f3FC00000;", x)
    upper = torch.from_numpy(x).to(of).view(torch.int16).numpy().view(np.uint16)
    lower = torch.tensor(1.5).to(of).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(found, upper.astype(np.uint32) << 16 | int(lower))


CONVERSIONS = {
    "cvt.rni.s32.f32": np.rint,
    "cvt.rzi.s32.f32": np.trunc,
    "cvt.rmi.s32.f32": np.floor,
    "cvt.rpi.s32.f32": np.ceil,
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversion_to_integers_saturates(name):
    x = floats(8) * np.float32(100)
    x[:4] = [np.nan, np.inf, -np.inf, 3e9]
    found, _ = execute(f"{name} %r3, %r2;", x)
    np.testing.assert_array_equal(found.view(np.int32)[4:], CONVERSIONS[name](x[4:]).astype(np.int32))
    np.testing.assert_array_equal(found.view(np.int32)[:4], [0, 2**31 - 1, -(2**31), 2**31 - 1])


def test_conversions_between_floats():
    x = floats(9)
    half, _ = execute("cvt.rn.f16.f32 %rs1, %r2; cvt.f32.f16 %r3, %rs1;", x)
    np.testing.assert_array_equal(half.view(np.float32), x.astype(np.float16).astype(np.float32))
    brain, _ = execute("cvt.rn.bf16.f32 %rs1, %r2; cvt.f32.bf16 %r3, %rs1;", x)
    np.testing.assert_array_equal(brain.view(np.float32), torch.from_numpy(x).bfloat16().float().numpy())
    whole, _ = execute("cvt.rn.f32.s32 %r3, %r2;", X)
    np.testing.assert_array_equal(whole.view(np.float32), SIGNED.astype(np.float32))
    tf32, _ = execute("cvt.rna.tf32.f32 %r3, %r2;", x)
    assert (tf32 & 0x1FFF == 0).all()
    np.testing.assert_allclose(tf32.view(np.float32), x, rtol=2**-11)


def test_packed_arithmetic():
    half = np.random.default_rng(10).standard_normal(128).astype(np.float16)
    found, _ = execute("fma.rn.f16x2 %r3, %r2, %r2, %r2;", half)
    np.testing.assert_array_equal(found.view(np.float16), (half.astype(np.float64) ** 2 + half).astype(np.float16))
    brain = torch.randn(128).bfloat16()
    found, _ = execute("mul.rn.bf16x2 %r3, %r2, %r2;", brain.view(torch.int16).numpy())
    np.testing.assert_array_equal(found.view(np.int16), (brain * brain).view(torch.int16).numpy())
    pairs = floats(11, 128)
    found, _ = execute("fma.rn.f32x2 %rd6, %rd5, %rd5, %rd5;", pairs, size=8)
    np.testing.assert_array_equal(found.view(np.float32), (pairs.astype(np.float64) ** 2 + pairs).astype(np.float32))


APPROXIMATE = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "tanh": np.tanh, "sqrt": np.sqrt,
               "rsqrt": lambda x: x**-0.5, "sin": np.sin, "cos": np.cos}  # fmt: skip


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations_are_near(name):
    x = np.abs(floats(12)) + np.float32(0.1)
    found, _ = execute(f"{name}.approx.f32 %r3, %r2;", x)
    np.testing.assert_allclose(found.view(np.float32), APPROXIMATE[name](x.astype(np.float64)), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        "fma.f32 %r3, %r2, %r2, %r2;",
        "fma.rn.relu.f32 %r3, %r2, %r2, %r2;",
        "add.cc.s32 %r3, %r2, %r2;",
        "ex2.f32 %r3, %r2;",
        "cvt.rn.satfinite.bf16x2.f32 %r3, %r2, %r2;",
        "ld.global.mystery.b32 %r3, [%rd4];",
        "vadd.s32.s32.s32 %r3, %r2, %r2, %r2;",
        "mul.hi.s64 %rd6, %rd5, %rd5;",
        "add.f32 %r3, %rd1, %r2;",
        "mov.u32 %r3, %clock;",
    ],
)
def test_what_is_not_known_is_an_error(body):
    with pytest.raises(Fault):
        execute(body, X)
