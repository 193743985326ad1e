"""The forward kernel. See tiles.py for the names."""

import triton
import triton.language as tl

from swat_flex.backends.triton.tiles import (
    exponent,
    head_of,
    ids_of,
    load_rows,
    logit_of,
    product,
    slope_in_range,
    store_rows,
    visible,
    weigh,
    weights,
)


@triton.jit
def _weights(s, n, first, ids, logit, band, MASKED: tl.constexpr, WAY: tl.constexpr):
    """2^SHIFT·σ(x) of the products s `[BM, BN]` of query rows at first … with keys n …; 0 where hidden."""
    BM: tl.constexpr = s.shape[0]
    HIDES: tl.constexpr = MASKED or band[3] is not None
    o_m, o_n = tl.arange(0, BM), tl.arange(0, s.shape[1])
    base = (first + BM // 2 - n).to(tl.float32)
    w = weigh(s, (o_m - BM // 2).to(tl.float32), -o_n.to(tl.float32), base, logit, WAY, not HIDES)
    if HIDES:
        w = tl.where(visible(first + o_m, n + o_n, band, ids), w, 0.0)
    return w


@triton.jit
def _attend(
    acc, acc2, rows, rows2, keys, values, span, band, MASKED: tl.constexpr, WAY: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """acc + Σ σ v over the key blocks of `span`, for rows = (q, position of the first, ids, logit); and so acc2."""
    q, first, ids, logit = rows
    q2, first2, ids2, logit2 = rows2
    start, stop, inner, gap = span
    kv_len = band[2]
    STEP: tl.constexpr = 2 * BN if PAIR == "keys" else BN
    for i_n in tl.range(start, stop, STEP, num_stages=STAGES, warp_specialize=SPECIALIZE):
        n = i_n
        if MASKED:
            n = tl.where(i_n < inner, i_n, i_n + gap)
        k = load_rows(keys, n, kv_len, BN, WIDTH, MASKED)  # [BN, BD]
        v = load_rows(values, n, kv_len, BN, VALUE_WIDTH, MASKED)  # [BN, BDV]
        s = product(q, tl.trans(k))  # [BM, BN]
        # Runs while the first half's weights are computed.
        if PAIR == "keys":
            k2 = load_rows(keys, n + BN, kv_len, BN, WIDTH, MASKED)
            v2 = load_rows(values, n + BN, kv_len, BN, VALUE_WIDTH, MASKED)
            s2 = product(q, tl.trans(k2))
        elif PAIR is not None:
            s2 = product(q2, tl.trans(k))
        w = _weights(s, n, first, ids, logit, band, MASKED, WAY)
        acc = product(w.to(v.dtype), v, acc)
        if PAIR == "keys":
            w = _weights(s2, n + BN, first, ids, logit, band, MASKED, WAY)
            acc = product(w.to(v.dtype), v2, acc)
        elif PAIR is not None:
            w = _weights(s2, n, first2, ids2, logit2, band, MASKED, WAY)
            acc2 = product(w.to(v.dtype), v, acc2)
    return acc, acc2


@triton.jit
def _attend_folded(acc, rows, k, v, k2, v2, n, n2, WAY: tl.constexpr):
    """acc + Σ σ v over the two edges: row r sees the columns after r of the keys n …, the rest of the keys n2 …."""
    q, first, _, logit = rows
    BM: tl.constexpr = q.shape[0]
    o_m, o_n = tl.arange(0, BM), tl.arange(0, k.shape[0])
    distance, columns, middle = (o_m - BM // 2).to(tl.float32), -o_n.to(tl.float32), first + BM // 2
    s, s2 = product(q, tl.trans(k)), product(q, tl.trans(k2))  # [BM, BN]
    y, row = exponent(s, distance, columns, (middle - n).to(tl.float32), logit, WAY, True)
    y2, _ = exponent(s2, distance, columns, (middle - n2).to(tl.float32), logit, WAY, True)
    after = o_n[None, :] > o_m[:, None]
    w = weights(tl.where(after, y, y2), row, WAY, True).to(v.dtype)
    zero = tl.zeros_like(w)
    acc = product(tl.where(after, w, zero), v, acc)
    return product(tl.where(after, zero, w), v2, acc)


@triton.jit(do_not_specialize=["q_len", "kv_len", "left", "right"])
def forward_kernel(
    q, k, v, out, q_strides, k_strides, v_strides, out_strides, per_head, documents, q_len, kv_len, left, right, scale,
    q_heads, group, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, WAY: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """out_i = Σ σ(scale·⟨q_i, k_j⟩ + slope·|i − j| + bias) v_j over −right ≤ i − j ≤ left.

    Grid: query blocks fastest, then heads, then the batch. One program owns BM query rows of one head; with PAIR
    "heads" the same rows of the next head too, which shares the key head; with "rows" the BM rows after them too. It
    takes two key blocks at a time with "keys". While the weights of one half are computed the other's products run.
    Reads: key blocks that touch the band: its edges masked, then the interior without mask arithmetic. With square
    tiles and a window of whole tiles the edges complete each other: a row sees of the left one just the columns that
    it does not see of the right one, and one tile of weights serves both.
    Writes: each row below Lq once, in out's dtype; sums in float32.
    Needs: strides in elements, order b h l d; per_head = (slopes, logit_bias), documents = (ids, stride) or None.
    """
    BDV: tl.constexpr = VALUE_WIDTH[1]
    SHIFT: tl.constexpr = WAY[2]
    HEADS: tl.constexpr = 2 if PAIR == "heads" else 1
    ROWS: tl.constexpr = 2 * BM if PAIR == "rows" else BM
    TWO: tl.constexpr = PAIR == "heads" or PAIR == "rows"
    EDGE_PAIR: tl.constexpr = PAIR if TWO else None
    FOLD: tl.constexpr = BM == BN and (PAIR is None or PAIR == "heads") and documents is None
    blocks = tl.cdiv(q_len, ROWS)
    i_m, i_bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_b, i_h = i_bh // (q_heads // HEADS), i_bh % (q_heads // HEADS) * HEADS
    i_h2, row, offset = i_h + (HEADS - 1), i_m * ROWS, kv_len - q_len
    row2 = row + (ROWS - BM)
    first, first2 = row + offset, row2 + offset
    keys, values = head_of(k, k_strides, i_b, i_h // group), head_of(v, v_strides, i_b, i_h // group)
    p_ids, ids, ids2 = None, None, None
    if documents is not None:
        p_ids = documents[0] + i_b.to(tl.int64) * documents[1]
        ids = ids_of(p_ids, first + tl.arange(0, BM), kv_len)
        ids2 = ids_of(p_ids, first2 + tl.arange(0, BM), kv_len)
    band = (left, right, kv_len, p_ids)
    b_q = load_rows(head_of(q, q_strides, i_b, i_h), row, q_len, BM, WIDTH, True)
    rows = (b_q, first, ids, logit_of(per_head, i_h, scale, WAY))
    rows2 = rows
    if TWO:
        b_q = load_rows(head_of(q, q_strides, i_b, i_h2), row2, q_len, BM, WIDTH, True)
        rows2 = (b_q, first2, ids2, logit_of(per_head, i_h2, scale, WAY))

    # Keys that a row sees: [start, stop). Every row sees every key of [inner, outer), whole blocks in between.
    start = tl.maximum(first - left, 0) // BN * BN
    stop = tl.minimum(first2 + BM + right, kv_len)
    inner = tl.minimum(tl.maximum(tl.cdiv(first2 + BM - 1 - left, BN) * BN, start), tl.cdiv(stop, BN) * BN)
    outer = tl.maximum(tl.minimum(first + right + 1, kv_len) // BN * BN, inner)
    in_range = slope_in_range(rows[3], BM, WAY) & slope_in_range(rows2[3], BM, WAY)
    outer = tl.where(in_range, outer, inner)
    if PAIR == "keys":
        outer -= (outer - inner) % (2 * BN)
    acc, acc2 = tl.zeros([BM, BDV], tl.float32), tl.zeros([BM, BDV], tl.float32)
    if FOLD:
        # Key blocks counted from the window's ends, where both lie inside: all between the two edges is interior.
        n, n2 = first - left - 1, first + right
        folds = in_range & (n >= 0) & (n2 + BN <= kv_len) & ((n2 - n) % BN == 0)
        start, stop = tl.where(folds, n + BN, start), tl.where(folds, n2, stop)
        inner, outer = tl.where(folds, start, inner), tl.where(folds, stop, outer)
        for _ in tl.range(0, folds.to(tl.int32), num_stages=1):
            b_k = load_rows(keys, n, kv_len, BN, WIDTH, False)
            b_v = load_rows(values, n, kv_len, BN, VALUE_WIDTH, False)
            b_k2 = load_rows(keys, n2, kv_len, BN, WIDTH, False)
            b_v2 = load_rows(values, n2, kv_len, BN, VALUE_WIDTH, False)
            acc = _attend_folded(acc, rows, b_k, b_v, b_k2, b_v2, n, n2, WAY)
            if TWO:
                acc2 = _attend_folded(acc2, rows2, b_k, b_v, b_k2, b_v2, n, n2, WAY)
    gap = outer - inner
    acc, acc2 = _attend(acc, acc2, rows, rows2, keys, values, (start, stop - gap, inner, gap), band, True, WAY, WIDTH,
                        VALUE_WIDTH, BN, STAGES, SPECIALIZE, EDGE_PAIR)  # fmt: skip
    acc, acc2 = _attend(acc, acc2, rows, rows2, keys, values, (inner, outer, inner, gap), band, False, WAY, WIDTH,
                        VALUE_WIDTH, BN, STAGES, SPECIALIZE, PAIR)  # fmt: skip
    if SHIFT != 0:
        acc *= 2.0**-SHIFT
        acc2 *= 2.0**-SHIFT
    store_rows(head_of(out, out_strides, i_b, i_h), acc, row, q_len, BM, VALUE_WIDTH)
    if TWO:
        store_rows(head_of(out, out_strides, i_b, i_h2), acc2, row2, q_len, BM, VALUE_WIDTH)
