"""The decode kernels: new queries against a ring of keys, split over the keys, and the sum of the parts.

Position p lives in slot p % slots. Of a row with `length` tokens the `live` newest, window + T − 1 at most, are seen by
one of its T queries: they are walked in order of position, the slot wraps once. Counted from the oldest of them query t
is live − T + t and key j is j. A sigmoid has no normaliser, so parts of the keys simply add.
See tiles.py for the names.
"""

import triton
import triton.language as tl

from swat_flex.backends.triton.sigmoid import sigmoid
from swat_flex.backends.triton.tiles import logit_of, product


@triton.jit
def _load_slots(head, slot, m, WIDTH: tl.constexpr):
    """Slots `slot` `[BN]` of a head, `[BN, BD]`; 0 where not m, which is not read, and past column D."""
    D: tl.constexpr = WIDTH[0]
    BD: tl.constexpr = WIDTH[1]
    p, strides = head
    o_d = tl.arange(0, BD)
    m = m[:, None]
    if D != BD:
        m = m & (o_d < D)[None, :]
    p = p + (slot.to(tl.int64) * strides[2])[:, None] + (o_d * strides[3])[None, :]
    return tl.load(p, mask=m, other=0.0)


@triton.jit(do_not_specialize=["slots", "window", "splits", "split_stride"])
def decode_kernel(
    q, keys, values, length, per_head, out, q_strides, k_strides, v_strides, out_strides, split_stride,
    tokens, slots, window, scale, kv_heads, group, splits, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    WAY: tl.constexpr, ONE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out_i = Σ σ(scale·⟨q_i, k_j⟩ + slope·(i − j) + bias) v_j over 0 ≤ i − j < window and one split of the keys.

    Grid: (splits·cdiv(group·T, BM)·Hkv·B,), splits fastest; one program owns up to BM queries of the heads that share a
    key head, and one split of its live keys, each of which it reads once.
    Reads: live slots alone; length `[B]` int64.
    Writes: each row of its part of out once, also where its split is empty; sums in float32, in out's dtype.
    Needs: strides in elements, order b h l d; split_stride elements from one part of out to the next; ONE = T is 1;
    per_head = (slopes, logit_bias), pointers or None.
    """
    D: tl.constexpr = WIDTH[0]
    BD: tl.constexpr = WIDTH[1]
    DV: tl.constexpr = VALUE_WIDTH[0]
    BDV: tl.constexpr = VALUE_WIDTH[1]
    HAS_SLOPES: tl.constexpr = WAY[0]
    SHIFT: tl.constexpr = WAY[2]
    KIND: tl.constexpr = WAY[3]
    tiles = tl.cdiv(group * tokens, BM)
    i_s, i_rest = tl.program_id(0) % splits, tl.program_id(0) // splits
    i_m, i_bh = i_rest % tiles, i_rest // tiles
    i_b, i_kv = i_bh // kv_heads, i_bh % kv_heads
    b, kv = i_b.to(tl.int64), i_kv.to(tl.int64)
    p_k, p_v = keys + b * k_strides[0] + kv * k_strides[1], values + b * v_strides[0] + kv * v_strides[1]

    # Row r is token r % T of the group's head r // T.
    row = i_m * BM + tl.arange(0, BM)
    m_row = (row < group * tokens)[:, None]
    token = row % tokens
    head = i_kv * group + tl.minimum(row // tokens, group - 1)
    factor, slope, bias = logit_of(per_head, head, scale, WAY)
    bias = tl.zeros([BM], tl.float32) + bias
    o_d, o_v, o_n = tl.arange(0, BD)[None, :], tl.arange(0, BDV)[None, :], tl.arange(0, BN)
    p_q = q + b * q_strides[0] + (head.to(tl.int64) * q_strides[1] + token * q_strides[2])[:, None] + o_d * q_strides[3]
    queries = tl.load(p_q, mask=m_row & (o_d < D), other=0.0)  # [BM, BD]

    count = tl.load(length + i_b)
    live = tl.minimum(count, window + tokens - 1).to(tl.int32)
    oldest = ((count - live) % slots).to(tl.int32)
    position = live - tokens + token  # of the queries, [BM]
    share = tl.cdiv(tl.cdiv(live, splits), BN) * BN
    start = i_s * share
    acc = tl.zeros([BM, BDV], tl.float32)
    for n in tl.range(start, tl.minimum(start + share, live), BN, num_stages=STAGES):
        j = n + o_n
        slot = oldest + j
        slot = tl.where(slot >= slots, slot - slots, slot)
        k = _load_slots((p_k, k_strides), slot, j < live, WIDTH)  # [BN, BD]
        v = _load_slots((p_v, v_strides), slot, j < live, VALUE_WIDTH)  # [BN, BDV]
        y = product(queries, tl.trans(k)) * factor  # [BM, BN]
        if HAS_SLOPES:
            # From this tile on, so that near keys have small numbers and all their digits.
            y += ((position - n) * slope + bias)[:, None] - o_n.to(tl.float32)[None, :] * slope[:, None]
        else:
            y += bias[:, None]
        w = sigmoid(y, SHIFT, KIND)
        if not ONE:  # a single query sees every live key; at live and beyond the values are 0
            distance = position[:, None] - j[None, :]
            w = tl.where(distance.to(tl.uint32) < tl.cast(window, tl.uint32), w, 0.0)  # 0 ≤ distance < window
        acc = product(w.to(v.dtype), v, acc)
    if SHIFT != 0:
        acc *= 2.0**-SHIFT
    p_out = out + i_s.to(tl.int64) * split_stride + b * out_strides[0]
    p_out += (head.to(tl.int64) * out_strides[1] + token * out_strides[2])[:, None] + o_v * out_strides[3]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=m_row & (o_v < DV))


@triton.jit(do_not_specialize=["splits", "split_stride"])
def sum_splits_kernel(
    partial, out, out_strides, split_stride, tokens, heads, splits, VALUE_WIDTH: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out = the sum of the parts, always in the same order.

    Grid: (T·Hq·B,), tokens fastest; one program owns one row.
    Reads: partial `[splits, B, Hq, T, Dv]` float32, contiguous. Writes: each row of out once, in its dtype.
    Needs: strides in elements, order b h l d; split_stride = B·Hq·T·Dv.
    """
    DV: tl.constexpr = VALUE_WIDTH[0]
    BDV: tl.constexpr = VALUE_WIDTH[1]
    i_row = tl.program_id(0).to(tl.int64)
    o_s, o_v = tl.arange(0, BS)[:, None], tl.arange(0, BDV)[None, :]
    acc = tl.zeros([BS, BDV], tl.float32)
    for s in range(0, splits, BS):
        p = partial + (s + o_s).to(tl.int64) * split_stride + i_row * DV + o_v
        acc += tl.load(p, mask=(s + o_s < splits) & (o_v < DV), other=0.0)
    i_t, i_bh = i_row % tokens, i_row // tokens
    p_out = out + (i_bh // heads) * out_strides[0] + (i_bh % heads) * out_strides[1] + i_t * out_strides[2]
    o_v = tl.arange(0, BDV)
    tl.store(p_out + o_v * out_strides[3], tl.sum(acc, 0).to(out.dtype.element_ty), mask=o_v < DV)
