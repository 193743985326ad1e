"""σ in a kernel, from the exponent y = −x·log2 e − SHIFT of its denominator: 2^SHIFT·σ(x) = 1 / (2^−SHIFT + 2^y).

The negation, the change of base and SHIFT are folded into the factors that make y, so they cost nothing here.
SHIFT is 0 but for float16, whose smallest number is 2⁻²⁴: weights times 2¹⁵ keep their digits far into the tail.

NVIDIA's GPUs evaluate few special functions per clock (16 per multiprocessor on Hopper). Where every pair of a tile is
visible, SHARED lets four sigmoids share one reciprocal, 1.25 special functions per score instead of 2. With the four
denominators a, b, c, d and r = 1/(abcd):

    1/a = b·cd·r    1/b = a·cd·r    1/c = d·ab·r    1/d = c·ab·r

So that abcd stays finite y is held at 30 − SHIFT: exact down to logits of −20.8, and 2⁻³⁰ below. The four lie in one
row of the tile, so that a row's weights depend on that row alone, their rounding and a NaN included. Tiles whose layout
does not put four of a row where the assembly looks for them use SINGLE: see `config.shares_reciprocals`.

What y owes to the row alone, `row`, multiplies: 2^y = 2^(y − row)·2^row, where the sum with 2^−SHIFT becomes a fused
multiply-add at no cost. |row| stays below ROW_LIMIT: 2^(y − row) is finite up to y = 30, and what it loses to underflow
lies below 2⁻³⁰.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

ROW_LIMIT = tl.constexpr(96.0)  # 96 + 30 < 128; and 96 − 126 = −30

# How a kernel computes σ.
PLAIN = tl.constexpr(0)  # exp2 and division: every target, no clamp; the choice for float32
SINGLE = tl.constexpr(1)  # NVIDIA from sm_80 on: the hardware's exp2 and reciprocal for each score
SHARED = tl.constexpr(2)  # the same, and one reciprocal for four scores where every pair of a tile is visible
TANH = tl.constexpr(3)  # NVIDIA: ½ + ½·tanh(x/2), whose tanh has 11 bits; y is x/2 here


def _each(one: str) -> tl.constexpr:
    """PTX for one sigmoid; `one` = 2^−SHIFT as hexadecimal float32."""
    return tl.constexpr(f"{{ .reg .f32 a; ex2.approx.ftz.f32 a, $1; add.f32 a, a, {one}; rcp.approx.ftz.f32 $0, a; }}")


def _four(one: str) -> tl.constexpr:
    """PTX for eight sigmoids, in two fours that share a reciprocal each, from y − row, its ceiling and 2^row.

    A thread holds the scores of a matrix product in turns of two from one row and two from the row eight below: of
    eight in a row, 0, 1, 4, 5 lie in one row and 2, 3, 6, 7 in the other. min.NaN keeps a visible NaN visible.
    """
    lines = [".reg .f32 a, b, c, d, ab, cd, r;"]
    for four in ((0, 1, 4, 5), (2, 3, 6, 7)):
        for x, n in zip("abcd", four, strict=True):
            lines += [f"min.NaN.f32 {x}, ${8 + n}, ${16 + n};", f"ex2.approx.ftz.f32 {x}, {x};"]
            lines += [f"fma.rn.f32 {x}, {x}, ${24 + n}, {one};"]
        lines += ["mul.f32 ab, a, b; mul.f32 cd, c, d; mul.f32 r, ab, cd; rcp.approx.ftz.f32 r, r;"]
        lines += ["mul.f32 cd, cd, r; mul.f32 ab, ab, r;"]
        lines += [f"mul.f32 ${n}, {x};" for n, x in zip(four, ("b, cd", "a, cd", "d, ab", "c, ab"), strict=True)]
    return tl.constexpr("{ " + " ".join(lines) + " }")


_ONE, _ONE_15 = "0f3F800000", "0f38000000"  # 1, 2⁻¹⁵
_EACH, _EACH_15 = _each(_ONE), _each(_ONE_15)
_FOUR, _FOUR_15 = _four(_ONE), _four(_ONE_15)
_EIGHT = tl.constexpr(",".join(["=&f"] * 8 + ["f"] * 24))


@triton.jit
def sigmoid(y, SHIFT: tl.constexpr, KIND: tl.constexpr):
    """2^SHIFT·σ(x) of every element, float32."""
    if KIND == PLAIN:
        ONE: tl.constexpr = 2.0**-SHIFT
        return 1.0 / (ONE + tl.exp2(y))
    if KIND == TANH:
        HALF: tl.constexpr = 2.0 ** (SHIFT - 1)
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)
        return t * HALF + HALF
    ASM: tl.constexpr = _EACH if SHIFT == 0 else _EACH_15
    return tl.inline_asm_elementwise(ASM, "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def shared_sigmoid(y, row, SHIFT: tl.constexpr):
    """2^SHIFT·σ(x) of y + row[:, None] `[R, C]`, float32, by SHARED; every pair of the tile is visible."""
    ceiling = (30 - SHIFT) - row
    ASM: tl.constexpr = _FOUR if SHIFT == 0 else _FOUR_15
    given = [y, ceiling[:, None], tl.exp2(row)[:, None]]
    return tl.inline_asm_elementwise(ASM, _EIGHT, given, dtype=tl.float32, is_pure=True, pack=8)
