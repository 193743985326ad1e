"""The forward kernel."""

import triton
import triton.language as tl

from swat_flex.backends.triton.tiles import (
    exponent,
    head_factors,
    head_of,
    is_gentle,
    load_rows,
    product,
    store_rows,
    visible,
    weigh,
    weights,
)


@triton.jit
def _weights(
    s, n, first, left, right, kv_len, p_ids, q_ids, factor, slope, bias,
    HAS_SLOPES: tl.constexpr, BOTH_SIDES: tl.constexpr, DOCUMENTS: tl.constexpr, MASKED: tl.constexpr,
    SHIFT: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """2^SHIFT·σ(x) of the products s `[BM, BN]` of query rows at first … with keys n …; 0 where hidden."""
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    rows, columns = (o_m - BM // 2).to(tl.float32), -o_n.to(tl.float32)
    base = (first + BM // 2 - n).to(tl.float32)
    w = weigh(s, rows, columns, base, factor, slope, bias, HAS_SLOPES, BOTH_SIDES, SHIFT, KIND,
              not (MASKED or DOCUMENTS))  # fmt: skip
    if MASKED or DOCUMENTS:
        seen = visible(first + o_m, n + o_n, left, right, kv_len, p_ids, q_ids, DOCUMENTS)
        w = tl.where(seen, w, 0.0)
    return w


@triton.jit
def _attend(
    acc, acc2, q, q2, p_k, p_v, k_at, v_at, p_ids, q_ids, q_ids2, start, stop, inner, gap, first, first2,
    left, right, kv_len, factor, slope, slope2, bias, bias2, HAS_SLOPES: tl.constexpr, BOTH_SIDES: tl.constexpr,
    DOCUMENTS: tl.constexpr, MASKED: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, SPECIALIZE: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """acc + Σ σ v over the key tiles of [start, stop), for the BM query rows from position `first` on; and so acc2.

    MASKED, tiles from `inner` on lie `gap` further right: the two edges in one loop fill the pipeline once.
    """
    STEP: tl.constexpr = 2 * BN if PAIR == "keys" else BN
    for i_n in tl.range(start, stop, STEP, num_stages=STAGES, warp_specialize=SPECIALIZE):
        n = i_n
        if MASKED:
            n = tl.where(i_n < inner, i_n, i_n + gap)
        k = load_rows(p_k, n, k_at, kv_len, BN, D, BD, MASKED)  # [BN, BD]
        v = load_rows(p_v, n, v_at, kv_len, BN, DV, BDV, MASKED)  # [BN, BDV]
        s = product(q, tl.trans(k))  # [BM, BN]
        # Runs while the first half's weights are computed.
        if PAIR == "keys":
            k2 = load_rows(p_k, n + BN, k_at, kv_len, BN, D, BD, MASKED)
            v2 = load_rows(p_v, n + BN, v_at, kv_len, BN, DV, BDV, MASKED)
            s2 = product(q, tl.trans(k2))
        elif PAIR is not None:
            s2 = product(q2, tl.trans(k))
        w = _weights(s, n, first, left, right, kv_len, p_ids, q_ids, factor, slope, bias, HAS_SLOPES, BOTH_SIDES,
                     DOCUMENTS, MASKED, SHIFT, KIND, BM, BN)  # fmt: skip
        acc = product(w.to(v.dtype), v, acc)
        if PAIR == "keys":
            w = _weights(s2, n + BN, first, left, right, kv_len, p_ids, q_ids, factor, slope, bias, HAS_SLOPES,
                         BOTH_SIDES, DOCUMENTS, MASKED, SHIFT, KIND, BM, BN)  # fmt: skip
            acc = product(w.to(v.dtype), v2, acc)
        elif PAIR is not None:
            w = _weights(s2, n, first2, left, right, kv_len, p_ids, q_ids2, factor, slope2, bias2, HAS_SLOPES,
                         BOTH_SIDES, DOCUMENTS, MASKED, SHIFT, KIND, BM, BN)  # fmt: skip
            acc2 = product(w.to(v.dtype), v, acc2)
    return acc, acc2


@triton.jit
def _attend_folded(
    acc, q, k, v, k2, v2, first, n, n2, factor, slope, bias, HAS_SLOPES: tl.constexpr, BOTH_SIDES: tl.constexpr,
    SHIFT: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """acc + Σ σ v over the two edges: row r sees the columns after r of the keys n …, the rest of the keys n2 …."""
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    rows, columns = (o_m - BM // 2).to(tl.float32), -o_n.to(tl.float32)
    middle = first + BM // 2
    s, s2 = product(q, tl.trans(k)), product(q, tl.trans(k2))  # [BM, BN]
    y, row = exponent(s, rows, columns, (middle - n).to(tl.float32), factor, slope, bias, HAS_SLOPES, BOTH_SIDES, KIND,
                      True)  # fmt: skip
    y2, _ = exponent(s2, rows, columns, (middle - n2).to(tl.float32), factor, slope, bias, HAS_SLOPES, BOTH_SIDES, KIND,
                     True)  # fmt: skip
    after = o_n[None, :] > o_m[:, None]
    w = weights(tl.where(after, y, y2), row, SHIFT, KIND, True).to(v.dtype)
    zero = tl.zeros_like(w)
    acc = product(tl.where(after, w, zero), v, acc)
    return product(tl.where(after, zero, w), v2, acc)


@triton.jit
def _query_rows(
    q, q_strides, q_len, i_b, i_h, row, offset, document_ids, document_stride, kv_len,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """(q `[BM, BD]`, ids `[BM, 1]`) of a head's rows from `row` on, which sit at row + offset."""
    p_q = q + i_b.to(tl.int64) * q_strides[0] + i_h.to(tl.int64) * q_strides[1]
    ids = 0
    if document_ids is not None:
        o_i = row + offset + tl.arange(0, BM)
        p_ids = document_ids + i_b.to(tl.int64) * document_stride
        ids = tl.load(p_ids + o_i, mask=o_i < kv_len, other=-1)[:, None]
    return load_rows(p_q, row, q_strides, q_len, BM, D, BD, True), ids


@triton.jit(do_not_specialize=["q_len", "kv_len", "left", "right"])
def forward_kernel(
    q, k, v, slopes, logit_bias, document_ids, out, q_strides, k_strides, v_strides, out_strides,
    q_len, kv_len, left, right, scale, q_heads, group, document_stride,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BOTH_SIDES: tl.constexpr,
    SHIFT: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    SPECIALIZE: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """out_i = Σ σ(scale·⟨q_i, k_j⟩ + slope·|i − j| + bias) v_j over −right ≤ i − j ≤ left.

    Grid: query tiles fastest, then heads, then the batch. One program owns BM query rows of one head; with PAIR "heads"
    the same rows of the next head too, which shares the key head; with "rows" the BM rows after them too. It takes two
    key tiles at a time with "keys". While the weights of one half are computed the other half's products run.
    Reads: key tiles that touch the band: its edges masked, then the interior without mask arithmetic. With square tiles
    and a window of whole tiles the edges complete each other: a row sees of the left one just the columns that it does
    not see of the right one, and one tile of weights serves both.
    Writes: each row below Lq once, in out's dtype; sums in float32.
    Needs: strides in elements, order b h l d; BD ≥ D and BDV ≥ DV powers of two, at least 16.
    """
    HEADS: tl.constexpr = 2 if PAIR == "heads" else 1
    ROWS: tl.constexpr = 2 * BM if PAIR == "rows" else BM
    TWO: tl.constexpr = PAIR == "heads" or PAIR == "rows"
    EDGE_PAIR: tl.constexpr = PAIR if TWO else None
    FOLD: tl.constexpr = BM == BN and (PAIR is None or PAIR == "heads") and document_ids is None
    tiles = tl.cdiv(q_len, ROWS)
    i_m, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_b, i_h = i_bh // (q_heads // HEADS), i_bh % (q_heads // HEADS) * HEADS
    i_h2, row, offset = i_h + (HEADS - 1), i_m * ROWS, kv_len - q_len
    row2 = row + (ROWS - BM)
    p_k, k_at = head_of(k, k_strides, i_b, i_h // group)
    p_v, v_at = head_of(v, v_strides, i_b, i_h // group)
    HAS_SLOPES: tl.constexpr = slopes is not None
    DOCUMENTS: tl.constexpr = document_ids is not None
    p_ids = document_ids
    if DOCUMENTS:
        p_ids = document_ids + i_b.to(tl.int64) * document_stride
    factor, slope, bias = head_factors(slopes, logit_bias, i_h, scale, SHIFT, KIND)
    queries, ids = _query_rows(q, q_strides, q_len, i_b, i_h, row, offset, document_ids, document_stride, kv_len, D, BD,
                               BM)  # fmt: skip
    slope2, bias2, queries2, ids2 = slope, bias, queries, ids
    if TWO:
        _, slope2, bias2 = head_factors(slopes, logit_bias, i_h2, scale, SHIFT, KIND)
        queries2, ids2 = _query_rows(q, q_strides, q_len, i_b, i_h2, row2, offset, document_ids, document_stride,
                                     kv_len, D, BD, BM)  # fmt: skip

    # Keys that a row sees: [start, stop). Every row sees every key of [inner, outer), whole tiles in between.
    first, first2 = row + offset, row2 + offset
    start = tl.maximum(first - left, 0) // BN * BN
    stop = tl.minimum(first2 + BM + right, kv_len)
    inner = tl.minimum(tl.maximum(tl.cdiv(first2 + BM - 1 - left, BN) * BN, start), tl.cdiv(stop, BN) * BN)
    outer = tl.maximum(tl.minimum(first + right + 1, kv_len) // BN * BN, inner)
    gentle = is_gentle(slope, BM, BOTH_SIDES, KIND) & is_gentle(slope2, BM, BOTH_SIDES, KIND)
    outer = tl.where(gentle, outer, inner)
    if PAIR == "keys":
        outer -= (outer - inner) % (2 * BN)
    acc, acc2 = tl.zeros([BM, BDV], tl.float32), tl.zeros([BM, BDV], tl.float32)
    if FOLD:
        # Key tiles counted from the window's ends, where both lie inside: all between the two edges is interior.
        n, n2 = first - left - 1, first + right
        folds = gentle & (n >= 0) & (n2 + BN <= kv_len) & ((n2 - n) % BN == 0)
        start, stop = tl.where(folds, n + BN, start), tl.where(folds, n2, stop)
        inner, outer = tl.where(folds, start, inner), tl.where(folds, stop, outer)
        for _ in tl.range(0, folds.to(tl.int32), num_stages=1):
            b_k = load_rows(p_k, n, k_at, kv_len, BN, D, BD, False)
            b_v = load_rows(p_v, n, v_at, kv_len, BN, DV, BDV, False)
            b_k2 = load_rows(p_k, n2, k_at, kv_len, BN, D, BD, False)
            b_v2 = load_rows(p_v, n2, v_at, kv_len, BN, DV, BDV, False)
            acc = _attend_folded(acc, queries, b_k, b_v, b_k2, b_v2, first, n, n2, factor, slope, bias, HAS_SLOPES,
                                 BOTH_SIDES, SHIFT, KIND, BM, BN)  # fmt: skip
            if TWO:
                acc2 = _attend_folded(acc2, queries2, b_k, b_v, b_k2, b_v2, first, n, n2, factor, slope2, bias2,
                                      HAS_SLOPES, BOTH_SIDES, SHIFT, KIND, BM, BN)  # fmt: skip
    gap = outer - inner
    acc, acc2 = _attend(
        acc, acc2, queries, queries2, p_k, p_v, k_at, v_at, p_ids, ids, ids2, start, stop - gap, inner, gap, first,
        first2, left, right, kv_len, factor, slope, slope2, bias, bias2, HAS_SLOPES, BOTH_SIDES, DOCUMENTS, True,
        SHIFT, KIND, D, DV, BD, BDV, BM, BN, STAGES, SPECIALIZE, EDGE_PAIR)  # fmt: skip
    acc, acc2 = _attend(
        acc, acc2, queries, queries2, p_k, p_v, k_at, v_at, p_ids, ids, ids2, inner, outer, inner, gap, first,
        first2, left, right, kv_len, factor, slope, slope2, bias, bias2, HAS_SLOPES, BOTH_SIDES, DOCUMENTS, False,
        SHIFT, KIND, D, DV, BD, BDV, BM, BN, STAGES, SPECIALIZE, PAIR)  # fmt: skip
    p_out = out + i_b.to(tl.int64) * out_strides[0]
    if SHIFT != 0:
        acc *= 2.0**-SHIFT
        acc2 *= 2.0**-SHIFT
    store_rows(p_out + i_h.to(tl.int64) * out_strides[1], acc, row, out_strides, q_len, BM, DV, BDV)
    if TWO:
        store_rows(p_out + i_h2.to(tl.int64) * out_strides[1], acc2, row2, out_strides, q_len, BM, DV, BDV)
