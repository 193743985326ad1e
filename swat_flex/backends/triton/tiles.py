"""What the kernels share: loading rows of a head, the weights of a tile, and which of its pairs are visible.

A tile pairs queries i with keys j. Positions are those of keys: query row r of Lq sits at r + Lk − Lq.
"""

import triton
import triton.language as tl

from swat_flex.backends.triton.sigmoid import FAST, LOG2E, ROW_LIMIT, TANH, shared_sigmoid, sigmoid


@triton.jit
def head_of(x, strides, i_b, i_h):
    """What `load_rows` takes for a head of x `[B, H, L, D]`: a pointer and strides, or a descriptor and indices."""
    if isinstance(x, tl.tensor_descriptor):
        return x, (i_b, i_h)
    else:  # noqa: RET505  # Triton compiles what follows a return, and there x must be a pointer
        return x + i_b.to(tl.int64) * strides[0] + (tl.zeros([], tl.int64) + i_h) * strides[1], strides


@triton.jit
def tile_offsets(o_r, o_d, strides):
    """Of the elements of a tile from its first, `[R, D]`; in 64 bits where the strides come with a fifth entry."""
    if len(strides) > 4:
        o_r, o_d = o_r.to(tl.int64), o_d.to(tl.int64)
    return o_r[:, None] * strides[2] + o_d[None, :] * strides[3]


@triton.jit
def load_rows(p, first, at, limit, ROWS: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, EDGE: tl.constexpr):
    """Rows first … first + ROWS of a head, `[ROWS, BD]`; 0 past column DIM and, with EDGE, from `limit` on.

    `p` and `at` are `head_of`'s. A descriptor knows its tensor's bounds: it needs no mask and gives 0 outside them.
    """
    if isinstance(p, tl.tensor_descriptor):
        return p.load([at[0], at[1], first, 0]).reshape(ROWS, BD)
    else:  # noqa: RET505
        o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BD)
        p = p + (tl.zeros([], tl.int64) + first) * at[2] + tile_offsets(o_r, o_d, at)
        if EDGE:
            m = (first + o_r < limit)[:, None]
            if DIM != BD:
                m = m & (o_d < DIM)[None, :]
            return tl.load(p, mask=m, other=0.0)
        if DIM != BD:
            return tl.load(p, mask=(o_d < DIM)[None, :], other=0.0)
        return tl.load(p)


@triton.jit
def store_rows(p, x, first, strides, limit, ROWS: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr):
    """Write `[ROWS, BD]` to rows first … of the head at `p`, in its dtype; rows from `limit` on are not."""
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BD)
    p = p + (tl.zeros([], tl.int64) + first) * strides[2] + tile_offsets(o_r, o_d, strides)
    tl.store(p, x.to(p.dtype.element_ty), mask=(first + o_r < limit)[:, None] & (o_d < DIM)[None, :])


@triton.jit
def product(a, b, acc=None):
    """a b + acc with float32 accumulation; float32 operands are multiplied as IEEE float32, not TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def head_factors(slopes, logit_bias, i_h, scale, SHIFT: tl.constexpr, KIND: tl.constexpr):
    """(factor, slope, bias) such that `sigmoid`'s y = factor·⟨q, k⟩ + slope·|i − j| + bias, for query head i_h."""
    BASE: tl.constexpr = 0.5 if KIND == TANH else -LOG2E
    factor = scale * BASE
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + i_h) * BASE
    bias = 0.0
    if KIND != TANH:
        bias = bias - SHIFT
    if logit_bias is not None:
        bias += tl.load(logit_bias + i_h) * BASE
    return factor, slope, bias


@triton.jit
def exponent(s, rows, columns, base, factor, slope, bias, HAS_SLOPES: tl.constexpr, BOTH_SIDES: tl.constexpr,
             KIND: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """(y `[R, C]`, row `[R]`) of the products s, as `weights` takes them; row is 0 unless KIND is FAST and SHARED.

    i − j = rows[:, None] + columns[None, :] + base (float32). With keys on one side only |i − j| = ±(i − j) splits into
    a part per row and a part per column.
    """
    row = tl.zeros_like(rows)
    if not HAS_SLOPES:
        y = s * factor + bias
    elif BOTH_SIDES:
        y = s * factor + (tl.abs((rows + base)[:, None] + columns[None, :]) * slope + bias)
    elif KIND == FAST and SHARED:
        y = s * factor + (columns * slope + (base * slope + bias))[None, :]
        row = rows * slope
    else:
        y = s * factor + ((rows * slope + (base * slope + bias))[:, None] + (columns * slope)[None, :])
    return y, row


@triton.jit
def weights(y, row, SHIFT: tl.constexpr, KIND: tl.constexpr, SHARED: tl.constexpr):
    """2^SHIFT·σ(x) of `exponent`'s result; SHARED where all of a row's elements may meet in one reciprocal."""
    if KIND == FAST and SHARED:
        return shared_sigmoid(y, row, SHIFT)
    return sigmoid(y, SHIFT, KIND)


@triton.jit
def weigh(s, rows, columns, base, factor, slope, bias, HAS_SLOPES: tl.constexpr, BOTH_SIDES: tl.constexpr,
          SHIFT: tl.constexpr, KIND: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """`weights` of `exponent`."""
    y, row = exponent(s, rows, columns, base, factor, slope, bias, HAS_SLOPES, BOTH_SIDES, KIND, SHARED)
    return weights(y, row, SHIFT, KIND, SHARED)


@triton.jit
def is_gentle(slope, ROWS: tl.constexpr, BOTH_SIDES: tl.constexpr, KIND: tl.constexpr):
    """Whether a row's part of y stays below ROW_LIMIT; where not, every tile of the head is taken as an edge."""
    if KIND != FAST or BOTH_SIDES:
        return True
    return tl.abs(slope) * (ROWS // 2) < ROW_LIMIT


@triton.jit
def same_document(q_ids, k_ids):
    """Equal ids that are not padding's; the two broadcast."""
    return (q_ids == k_ids) & (q_ids >= 0)


@triton.jit
def visible(i, j, left, right, kv_len, p_ids, q_ids, DOCUMENTS: tl.constexpr):
    """Which keys at positions j `[BN]` the queries at i `[BM]` with ids q_ids `[BM, 1]` see, `[BM, BN]`."""
    seen = (j[None, :] >= (i - left)[:, None]) & (j[None, :] <= (i + right)[:, None])
    if DOCUMENTS:
        seen &= same_document(q_ids, tl.load(p_ids + j, mask=j < kv_len, other=-1)[None, :])
    return seen
