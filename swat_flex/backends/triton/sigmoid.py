"""σ in a kernel, from the exponent y = −x·log2 e − SHIFT of its denominator: 2^SHIFT·σ(x) = 1 / (2^−SHIFT + 2^y).

The negation, the change of base and SHIFT are folded into the factors that make y, so they cost nothing here.
SHIFT is 0 but for float16, whose smallest number is 2⁻²⁴: weights times 2¹⁵ keep their digits far into the tail.

NVIDIA's GPUs evaluate few special functions per clock (16 per multiprocessor on Hopper). Where every pair of a tile is
visible, FAST lets four sigmoids share one reciprocal, 1.25 special functions per score instead of 2. With the four
denominators a, b, c, d and r = 1/(abcd):

    1/a = b·cd·r    1/b = a·cd·r    1/c = d·ab·r    1/d = c·ab·r

So that abcd stays finite y is held at 30 − SHIFT: exact down to logits of −20.8, and 2⁻³⁰ below. The four lie in one
row of the tile, so that the rounding of a row's weights depends on that row alone.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# How a kernel computes σ.
PLAIN = tl.constexpr(0)  # exp2 and division: every target, no clamp; the choice for float32
FAST = tl.constexpr(1)  # NVIDIA from sm_80 on
TANH = tl.constexpr(2)  # NVIDIA: ½ + ½·tanh(x/2), whose tanh has 11 bits; y is x/2 here


def _single(one: str) -> tl.constexpr:
    """PTX for one sigmoid; `one` = 2^−SHIFT as hexadecimal float32."""
    return tl.constexpr(f"{{ .reg .f32 a; ex2.approx.ftz.f32 a, $1; add.f32 a, a, {one}; rcp.approx.ftz.f32 $0, a; }}")


def _shared(one: str, ceiling: str) -> tl.constexpr:
    """PTX for eight sigmoids, in two fours that share a reciprocal each; `ceiling` of y as hexadecimal float32.

    A thread holds the scores of a matrix product in turns of two from one row and two from the row eight below: of
    eight in a row, 0, 1, 4, 5 lie in one row and 2, 3, 6, 7 in the other. min.NaN keeps a visible NaN visible.
    """
    lines = [".reg .f32 a, b, c, d, ab, cd, r;"]
    for four in ((0, 1, 4, 5), (2, 3, 6, 7)):
        for x, n in zip("abcd", four, strict=True):
            lines += [f"min.NaN.f32 {x}, ${8 + n}, {ceiling};", f"ex2.approx.ftz.f32 {x}, {x};"]
            lines += [f"add.f32 {x}, {x}, {one};"]
        lines += ["mul.f32 ab, a, b; mul.f32 cd, c, d; mul.f32 r, ab, cd; rcp.approx.ftz.f32 r, r;"]
        lines += ["mul.f32 cd, cd, r; mul.f32 ab, ab, r;"]
        lines += [f"mul.f32 ${n}, {x};" for n, x in zip(four, ("b, cd", "a, cd", "d, ab", "c, ab"), strict=True)]
    return tl.constexpr("{ " + " ".join(lines) + " }")


_ONE, _CEILING = "0f3F800000", "0f41F00000"  # 1, 30
_ONE_15, _CEILING_15 = "0f38000000", "0f41700000"  # 2⁻¹⁵, 15
_SINGLE, _SINGLE_15 = _single(_ONE), _single(_ONE_15)
_SHARED, _SHARED_15 = _shared(_ONE, _CEILING), _shared(_ONE_15, _CEILING_15)
_EIGHT = tl.constexpr(",".join(["=&f"] * 8 + ["f"] * 8))


@triton.jit
def sigmoid(y, SHIFT: tl.constexpr, KIND: tl.constexpr, SHARED: tl.constexpr):
    """2^SHIFT·σ(x) of every element, float32; SHARED where all of a row's elements may meet in one reciprocal."""
    if KIND == PLAIN:
        ONE: tl.constexpr = 2.0**-SHIFT
        return 1.0 / (ONE + tl.exp2(y))
    if KIND == TANH:
        HALF: tl.constexpr = 2.0 ** (SHIFT - 1)
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)
        return t * HALF + HALF
    if SHARED:
        ASM: tl.constexpr = _SHARED if SHIFT == 0 else _SHARED_15
        return tl.inline_asm_elementwise(ASM, _EIGHT, [y], dtype=tl.float32, is_pure=True, pack=8)
    ASM1: tl.constexpr = _SINGLE if SHIFT == 0 else _SINGLE_15
    return tl.inline_asm_elementwise(ASM1, "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)
