"""The forward kernel."""

import triton
import triton.language as tl

from swat_flex.backends.triton.tiles import (
    end_of_interior,
    head_factors,
    head_of,
    load_rows,
    product,
    same_document,
    store_rows,
    weigh,
)


@triton.jit
def _attend(
    acc, q, p_k, p_v, k_at, v_at, p_ids, q_ids, start, stop, inner, gap, first, left, right, kv_len,
    factor, slope, bias, HAS_SLOPES: tl.constexpr, BOTH_SIDES: tl.constexpr, DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """acc + Σ σ v over the key tiles of [start, stop), for the query rows at positions first … first + BM.

    MASKED, tiles from `inner` on lie `gap` further right: the two edges in one loop fill the pipeline once.
    """
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    rows, columns = (o_m - BM // 2).to(tl.float32), -o_n.to(tl.float32)
    for i_n in tl.range(start, stop, BN, num_stages=STAGES, warp_specialize=SPECIALIZE):
        n = i_n
        if MASKED:
            n = tl.where(i_n < inner, i_n, i_n + gap)
        k = load_rows(p_k, n, k_at, kv_len, BN, D, BD, MASKED)  # [BN, BD]
        v = load_rows(p_v, n, v_at, kv_len, BN, DV, BDV, MASKED)  # [BN, BDV]
        s = product(q, tl.trans(k))  # [BM, BN]
        base = (first + BM // 2 - n).to(tl.float32)
        w = weigh(s, rows, columns, base, factor, slope, bias, HAS_SLOPES, BOTH_SIDES, SHIFT, KIND,
                  not (MASKED or DOCUMENTS))  # fmt: skip
        if MASKED or DOCUMENTS:
            j = n + o_n
            seen = (j[None, :] >= (first + o_m - left)[:, None]) & (j[None, :] <= (first + o_m + right)[:, None])
            if DOCUMENTS:
                seen &= same_document(q_ids, tl.load(p_ids + j, mask=j < kv_len, other=-1)[None, :])
            w = tl.where(seen, w, 0.0)
        acc = product(w.to(v.dtype), v, acc)
    return acc


@triton.jit(do_not_specialize=["q_len", "kv_len", "left", "right"])
def forward_kernel(
    q, k, v, slopes, logit_bias, document_ids, out, q_strides, k_strides, v_strides, out_strides,
    q_len, kv_len, left, right, scale, q_heads, group, document_stride,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BOTH_SIDES: tl.constexpr,
    SHIFT: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """out_i = Σ σ(scale·⟨q_i, k_j⟩ + slope·|i − j| + bias) v_j over −right ≤ i − j ≤ left.

    Grid: (cdiv(Lq, BM)·Hq·B,), query tiles fastest; one program owns BM query rows of one query head.
    Reads: key tiles that touch the band: its edges masked, then the interior without mask arithmetic.
    Writes: each row below Lq once, in out's dtype; sums in float32.
    Needs: strides in elements, order b h l d; BD ≥ D and BDV ≥ DV powers of two, at least 16.
    """
    tiles = tl.cdiv(q_len, BM)
    i_m, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_b, i_h = i_bh // q_heads, i_bh % q_heads
    b, i_kv = i_b.to(tl.int64), i_h // group
    p_k, k_at = head_of(k, k_strides, i_b, i_kv)
    p_v, v_at = head_of(v, v_strides, i_b, i_kv)
    HAS_SLOPES: tl.constexpr = slopes is not None
    DOCUMENTS: tl.constexpr = document_ids is not None
    factor, slope, bias = head_factors(slopes, logit_bias, i_h, scale, SHIFT, KIND)

    row = i_m * BM
    first = row + kv_len - q_len
    p_q = q + b * q_strides[0] + i_h.to(tl.int64) * q_strides[1]
    queries = load_rows(p_q, row, q_strides, q_len, BM, D, BD, True)
    p_ids, q_ids = document_ids, 0
    if DOCUMENTS:
        p_ids = document_ids + b * document_stride
        o_i = first + tl.arange(0, BM)
        q_ids = tl.load(p_ids + o_i, mask=o_i < kv_len, other=-1)[:, None]

    # Keys the tile touches: [start, stop). Every row sees every key of [inner, outer), whole tiles in between.
    start = tl.maximum(first - left, 0) // BN * BN
    stop = tl.minimum(first + BM + right, kv_len)
    inner = tl.minimum(tl.maximum(tl.cdiv(first + BM - 1 - left, BN) * BN, start), tl.cdiv(stop, BN) * BN)
    outer = tl.maximum(tl.minimum(first + right + 1, kv_len) // BN * BN, inner)
    outer = end_of_interior(inner, outer, slope, BM, BOTH_SIDES, KIND)
    gap = outer - inner
    acc = tl.zeros([BM, BDV], tl.float32)
    acc = _attend(acc, queries, p_k, p_v, k_at, v_at, p_ids, q_ids, start, stop - gap, inner, gap, first, left, right,
                  kv_len, factor, slope, bias, HAS_SLOPES, BOTH_SIDES, DOCUMENTS, True, SHIFT, KIND, D, DV, BD, BDV,
                  BM, BN, STAGES, SPECIALIZE)  # fmt: skip
    acc = _attend(acc, queries, p_k, p_v, k_at, v_at, p_ids, q_ids, inner, outer, inner, gap, first, left, right,
                  kv_len, factor, slope, bias, HAS_SLOPES, BOTH_SIDES, DOCUMENTS, False, SHIFT, KIND, D, DV, BD, BDV,
                  BM, BN, STAGES, SPECIALIZE)  # fmt: skip
    if SHIFT != 0:
        acc *= 2.0**-SHIFT
    p_out = out + b * out_strides[0] + i_h.to(tl.int64) * out_strides[1]
    store_rows(p_out, acc, row, out_strides, q_len, BM, DV, BDV)
