"""What the kernels share: loading rows of a head, the weights of a tile, and which of its pairs are visible.

A tile pairs a block of BM queries i with a block of BN keys j. Positions are those of keys: query row r of Lq sits at
r + Lk − Lq. Capitals are compile-time constants. Names begin with `p_` for a pointer, `o_` for offsets, `i_` for an
index into the grid, `b_` for a block of values and `m_` for a mask. What travels together is a tuple:

    head    (pointer, strides) of one head's rows `[L, D]`, or (descriptor, indices of batch and head)
    WIDTH   (D, BD): columns of a head, and the power of two that a block pads them to
    logit   (factor, slope, bias) of a head: its exponent is y = factor·⟨q, k⟩ + slope·|i − j| + bias
    WAY     (HAS_SLOPES, BOTH_SIDES, SHIFT, KIND): whether a call has slopes, and keys on both sides of
            a query; and how `sigmoid` computes
    band    (left, right, kv_len, p_ids): what decides whether a pair is visible; p_ids is None without documents
    span    (start, stop, inner, gap): a loop over blocks from start to stop; with masks, those from `inner` on lie
            `gap` further on, so that a window's two edges are one loop and fill the pipeline once
"""

import triton
import triton.language as tl

from swat_flex.backends.triton.sigmoid import LOG2E, ROW_LIMIT, SHARED, TANH, shared_sigmoid, sigmoid


@triton.jit
def head_of(x, strides, i_b, i_h):
    """Head i_h of sequence i_b of x `[B, H, L, D]`, a pointer with its strides in elements or a descriptor."""
    if isinstance(x, tl.tensor_descriptor):
        return x, (i_b, i_h)
    else:  # noqa: RET505  # Triton compiles what follows a return, and there x must be a pointer
        return x + i_b.to(tl.int64) * strides[0] + (tl.zeros([], tl.int64) + i_h) * strides[1], strides


@triton.jit
def block_offsets(o_r, o_d, strides):
    """Offsets of a block's elements from its first, `[R, D]`; in 64 bits where the strides have a fifth entry."""
    if len(strides) > 4:
        o_r, o_d = o_r.to(tl.int64), o_d.to(tl.int64)
    return o_r[:, None] * strides[2] + o_d[None, :] * strides[3]


@triton.jit
def load_rows(head, first, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr, EDGE: tl.constexpr):
    """Rows first … first + ROWS of a head, `[ROWS, BD]`; 0 past column D and, with EDGE, from row `limit` on.

    A descriptor knows its tensor's bounds: it needs no mask and gives 0 outside them.
    """
    D: tl.constexpr = WIDTH[0]
    BD: tl.constexpr = WIDTH[1]
    p, at = head
    if isinstance(p, tl.tensor_descriptor):
        return p.load([at[0], at[1], first, 0]).reshape(ROWS, BD)
    else:  # noqa: RET505
        o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BD)
        p = p + (tl.zeros([], tl.int64) + first) * at[2] + block_offsets(o_r, o_d, at)
        if EDGE:
            m = (first + o_r < limit)[:, None]
            if D != BD:
                m = m & (o_d < D)[None, :]
            return tl.load(p, mask=m, other=0.0)
        if D != BD:
            return tl.load(p, mask=(o_d < D)[None, :], other=0.0)
        return tl.load(p)


@triton.jit
def store_rows(head, x, first, limit, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write x `[ROWS, BD]` to the rows first … of a head, in its dtype; columns from D and rows from `limit` on not."""
    D: tl.constexpr = WIDTH[0]
    BD: tl.constexpr = WIDTH[1]
    p, strides = head
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BD)
    p = p + (tl.zeros([], tl.int64) + first) * strides[2] + block_offsets(o_r, o_d, strides)
    tl.store(p, x.to(p.dtype.element_ty), mask=(first + o_r < limit)[:, None] & (o_d < D)[None, :])


@triton.jit
def product(a, b, acc=None):
    """a b + acc with float32 accumulation; float32 operands are multiplied as IEEE float32, not TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def logit_of(per_head, i_h, scale, WAY: tl.constexpr):
    """The logit of query head i_h, from per_head = (slopes, logit_bias), pointers or None."""
    SHIFT: tl.constexpr = WAY[2]
    KIND: tl.constexpr = WAY[3]
    BASE: tl.constexpr = 0.5 if KIND == TANH else -LOG2E
    slopes, logit_bias = per_head
    slope = 0.0
    if slopes is not None:
        slope = tl.load(slopes + i_h) * BASE
    bias = 0.0
    if KIND != TANH:
        bias = bias - SHIFT
    if logit_bias is not None:
        bias += tl.load(logit_bias + i_h) * BASE
    return scale * BASE, slope, bias


@triton.jit
def exponent(s, rows, columns, base, logit, WAY: tl.constexpr, WHOLE: tl.constexpr):
    """(y `[R, C]`, row `[R]`) of the products s, as `weights` takes them; row is 0 unless SHARED and WHOLE.

    i − j = rows[:, None] + columns[None, :] + base (float32). With keys on one side only |i − j| = ±(i − j) splits into
    a part per row and a part per column.
    """
    HAS_SLOPES: tl.constexpr = WAY[0]
    BOTH_SIDES: tl.constexpr = WAY[1]
    KIND: tl.constexpr = WAY[3]
    factor, slope, bias = logit
    row = tl.zeros_like(rows)
    if not HAS_SLOPES:
        y = s * factor + bias
    elif BOTH_SIDES:
        y = s * factor + (tl.abs((rows + base)[:, None] + columns[None, :]) * slope + bias)
    elif KIND == SHARED and WHOLE:
        y = s * factor + (columns * slope + (base * slope + bias))[None, :]
        row = rows * slope
    else:
        y = s * factor + ((rows * slope + (base * slope + bias))[:, None] + (columns * slope)[None, :])
    return y, row


@triton.jit
def weights(y, row, WAY: tl.constexpr, WHOLE: tl.constexpr):
    """2^SHIFT·σ(x) of `exponent`'s result; WHOLE where every pair of the tile is visible."""
    SHIFT: tl.constexpr = WAY[2]
    KIND: tl.constexpr = WAY[3]
    if KIND == SHARED and WHOLE:
        return shared_sigmoid(y, row, SHIFT)
    return sigmoid(y, SHIFT, KIND)


@triton.jit
def weigh(s, rows, columns, base, logit, WAY: tl.constexpr, WHOLE: tl.constexpr):
    """`weights` of `exponent`."""
    y, row = exponent(s, rows, columns, base, logit, WAY, WHOLE)
    return weights(y, row, WAY, WHOLE)


@triton.jit
def slope_in_range(logit, ROWS: tl.constexpr, WAY: tl.constexpr):
    """Tell whether a row's part of y stays below ROW_LIMIT; where not, every tile of the head is taken as an edge."""
    BOTH_SIDES: tl.constexpr = WAY[1]
    KIND: tl.constexpr = WAY[3]
    if KIND != SHARED or BOTH_SIDES:
        return True
    return tl.abs(logit[1]) * (ROWS // 2) < ROW_LIMIT


@triton.jit
def ids_of(p_ids, o, limit):
    """Document ids of the tokens at o `[R]`, `[R, 1]`; −1, that of padding, from `limit` on."""
    return tl.load(p_ids + o, mask=o < limit, other=-1)[:, None]


@triton.jit
def same_document(q_ids, k_ids):
    """Equal ids that are not padding's; the two broadcast."""
    return (q_ids == k_ids) & (q_ids >= 0)


@triton.jit
def visible(i, j, band, q_ids):
    """Which keys at positions j `[BN]` the queries at i `[BM]` with ids q_ids `[BM, 1]` see, `[BM, BN]`."""
    left, right, kv_len, p_ids = band
    seen = (j[None, :] >= (i - left)[:, None]) & (j[None, :] <= (i + right)[:, None])
    if p_ids is not None:
        seen &= same_document(q_ids, tl.load(p_ids + j, mask=j < kv_len, other=-1)[None, :])
    return seen
