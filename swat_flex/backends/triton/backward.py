"""The backward kernels: one owns query rows and gives dq, one owns keys and gives dk and dv. Both recompute the tile.

With w = σ(x) and dw = ⟨do_i, v_j⟩ the logit's gradient is dx = dw·w·(1 − w), and

    dq_i = scale·Σ_j dx k_j    dk_j = scale·Σ_i dx q_i    dv_j = Σ_i w do_i    dslope = Σ dx·|i − j|    dbias = Σ dx

A sigmoid needs neither the output nor a row's sum to get there. Nothing is added atomically: runs repeat to the bit.

float16 rounds dx times `dx_scale`, a power of two that puts its bound just below the largest float16.
See tiles.py for the names.
"""

import triton
import triton.language as tl

from swat_flex.backends.triton.tiles import (
    head_of,
    ids_of,
    load_rows,
    logit_of,
    product,
    same_document,
    slope_in_range,
    store_rows,
    visible,
    weigh,
)


@triton.jit
def _query_gradient(
    dq, dslope, dbias, rows, keys, values, span, band, dx_scale, PER_HEAD: tl.constexpr, MASKED: tl.constexpr,
    WAY: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(dq, dslope, dbias) plus what the key blocks of `span` give; dq lacks scale and has dx_scale.

    rows = (q, gradient of the output, position of the first, ids, logit).
    """
    q, grad, first, ids, logit = rows
    start, stop, inner, gap = span
    kv_len = band[2]
    BM: tl.constexpr = q.shape[0]
    HIDES: tl.constexpr = MASKED or band[3] is not None
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    distance, columns = (o_m - BM // 2).to(tl.float32), -o_n.to(tl.float32)
    for i_n in tl.range(start, stop, BN, num_stages=STAGES):
        n = i_n
        if MASKED:
            n = tl.where(i_n < inner, i_n, i_n + gap)
        k = load_rows(keys, n, kv_len, BN, WIDTH, MASKED)  # [BN, BD]
        v = load_rows(values, n, kv_len, BN, VALUE_WIDTH, MASKED)  # [BN, BDV]
        base = (first + BM // 2 - n).to(tl.float32)
        w = weigh(product(q, tl.trans(k)), distance, columns, base, logit, WAY, not HIDES)
        dx = product(grad, tl.trans(v)) * (w - w * w)  # [BM, BN]
        if HIDES:
            dx = tl.where(visible(first + o_m, n + o_n, band, ids), dx, 0.0)
        if PER_HEAD:
            dslope += tl.sum(dx * tl.abs((distance + base)[:, None] + columns[None, :]), 1)
            dbias += tl.sum(dx, 1)
        dq = product((dx * dx_scale).to(k.dtype), k, dq)
    return dq, dslope, dbias


@triton.jit(do_not_specialize=["q_len", "kv_len", "left", "right"])
def query_gradient_kernel(
    grad, q, k, v, dq, partial, dx_scale, grad_strides, q_strides, k_strides, v_strides, dq_strides, per_head,
    documents, q_len, kv_len, left, right, scale, q_heads, group, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    WAY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, and for the per-head gradients one partial sum per program.

    Grid: (cdiv(Lq, BM)·Hq·B,), query blocks fastest; one program owns BM query rows of one query head.
    Reads: as the forward, and the rows of the output's gradient.
    Writes: each row of dq below Lq once; partial `[2, B·Hq·cdiv(Lq, BM)]` (dslope, dbias) unless it is None.
    Needs: what the forward needs, SHIFT 0; dx_scale a pointer to one float32, or None for 1.
    """
    blocks = tl.cdiv(q_len, BM)
    i_m, i_bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_b, i_h = i_bh // q_heads, i_bh % q_heads
    BD: tl.constexpr = WIDTH[1]
    PER_HEAD: tl.constexpr = partial is not None
    up = 1.0
    if dx_scale is not None:
        up = tl.load(dx_scale)

    row = i_m * BM
    first = row + kv_len - q_len
    keys, values = head_of(k, k_strides, i_b, i_h // group), head_of(v, v_strides, i_b, i_h // group)
    p_ids, ids = None, None
    if documents is not None:
        p_ids = documents[0] + i_b.to(tl.int64) * documents[1]
        ids = ids_of(p_ids, first + tl.arange(0, BM), kv_len)
    band = (left, right, kv_len, p_ids)
    b_q = load_rows(head_of(q, q_strides, i_b, i_h), row, q_len, BM, WIDTH, True)
    b_grad = load_rows(head_of(grad, grad_strides, i_b, i_h), row, q_len, BM, VALUE_WIDTH, True)
    rows = (b_q, b_grad, first, ids, logit_of(per_head, i_h, scale, WAY))

    start = tl.maximum(first - left, 0) // BN * BN
    stop = tl.minimum(first + BM + right, kv_len)
    inner = tl.minimum(tl.maximum(tl.cdiv(first + BM - 1 - left, BN) * BN, start), tl.cdiv(stop, BN) * BN)
    outer = tl.maximum(tl.minimum(first + right + 1, kv_len) // BN * BN, inner)
    outer = tl.where(slope_in_range(rows[4], BM, WAY), outer, inner)
    gap = outer - inner
    acc, dslope, dbias = tl.zeros([BM, BD], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    acc, dslope, dbias = _query_gradient(acc, dslope, dbias, rows, keys, values, (start, stop - gap, inner, gap), band,
                                         up, PER_HEAD, True, WAY, WIDTH, VALUE_WIDTH, BN, STAGES)  # fmt: skip
    acc, dslope, dbias = _query_gradient(acc, dslope, dbias, rows, keys, values, (inner, outer, inner, gap), band,
                                         up, PER_HEAD, False, WAY, WIDTH, VALUE_WIDTH, BN, STAGES)  # fmt: skip
    store_rows(head_of(dq, dq_strides, i_b, i_h), acc * (scale / up), row, q_len, BM, WIDTH)
    if PER_HEAD:
        tl.store(partial + tl.program_id(0), tl.sum(dslope, 0))
        tl.store(partial + tl.num_programs(0) + tl.program_id(0), tl.sum(dbias, 0))


@triton.jit
def _key_gradients(
    dk, dv, keys, queries, grads, span, sides, q_len, logit, dx_scale, MASKED: tl.constexpr,
    WAY: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(dk, dv) of a block of keys plus what the query blocks of `span` give, scaled as in the kernel.

    The tile is transposed, `[BN, BM]`. keys = (k, v, n, k_ids), the first at position n counted in rows of
    queries; sides = (left, right, p_ids), where p_ids counts likewise.
    """
    k, v, n, k_ids = keys
    start, stop, inner, gap = span
    left, right, p_ids = sides
    BN: tl.constexpr = k.shape[0]
    HIDES: tl.constexpr = MASKED or p_ids is not None
    SHIFT: tl.constexpr = WAY[2]
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    rows, columns = (-o_n + BN // 2).to(tl.float32), o_m.to(tl.float32)
    for i_m in tl.range(start, stop, BM, num_stages=STAGES):
        m = i_m
        if MASKED:
            m = tl.where(i_m < inner, i_m, i_m + gap)
        q = load_rows(queries, m, q_len, BM, WIDTH, MASKED)  # [BM, BD]
        grad = load_rows(grads, m, q_len, BM, VALUE_WIDTH, MASKED)  # [BM, BDV]
        s = product(k, tl.trans(q))
        dw = product(v, tl.trans(grad))
        w = weigh(s, rows, columns, (m - n - BN // 2).to(tl.float32), logit, WAY, not HIDES)
        if HIDES:
            d = (m - n + o_m)[None, :] - o_n[:, None]
            seen = (d + right).to(tl.uint32) <= (left + right).to(tl.uint32)  # −right ≤ d ≤ left
            if p_ids is not None:
                q_ids = tl.load(p_ids + m + o_m, mask=m + o_m < q_len, other=-1)[None, :]
                seen &= same_document(q_ids, k_ids)
            w = tl.where(seen, w, 0.0)
        dv = product(w.to(grad.dtype), grad, dv)
        dx = dw * (w - w * (w * 2.0**-SHIFT))  # [BN, BM], times 2^SHIFT
        if HIDES:
            dx = tl.where(w == 0.0, 0.0, dx)  # hidden: not even NaN from an unseen value
        dk = product((dx * dx_scale).to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["q_len", "kv_len", "left", "right"])
def key_gradients_kernel(
    grad, q, k, v, dk, dv, dx_scale, grad_strides, q_strides, k_strides, v_strides, dk_strides, dv_strides, per_head,
    documents, q_len, kv_len, left, right, scale, q_heads, group, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    WAY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv, summed over the query heads that share a key head.

    Grid: (cdiv(Lk, BN)·Hkv·B,), key blocks fastest; one program owns BN keys of one key head.
    Reads: query blocks that touch the band, for each query head of the group in turn: edges masked, then the interior.
    Writes: each row of dk and dv below Lk once, keys that nobody sees as 0.
    Needs: what the forward needs; dx_scale a pointer to one float32, or None for 1.
    """
    blocks, kv_heads = tl.cdiv(kv_len, BN), q_heads // group
    i_n, i_bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_b, i_kv = i_bh // kv_heads, i_bh % kv_heads
    BD: tl.constexpr = WIDTH[1]
    BDV: tl.constexpr = VALUE_WIDTH[1]
    SHIFT: tl.constexpr = WAY[2]
    up = 1.0
    if dx_scale is not None:
        up = tl.load(dx_scale)
    up = up * 2.0**-SHIFT

    n, offset = i_n * BN, kv_len - q_len
    b_k = load_rows(head_of(k, k_strides, i_b, i_kv), n, kv_len, BN, WIDTH, True)
    b_v = load_rows(head_of(v, v_strides, i_b, i_kv), n, kv_len, BN, VALUE_WIDTH, True)
    p_ids, k_ids = None, None
    if documents is not None:
        p_ids = documents[0] + i_b.to(tl.int64) * documents[1]
        k_ids = ids_of(p_ids, n + tl.arange(0, BN), kv_len)
        p_ids += offset
    at = n - offset
    keys, sides = (b_k, b_v, at, k_ids), (left, right, p_ids)

    # Query rows that see a key of the block: [start, stop). Every row of [inner, outer) sees every key.
    start = tl.maximum(at - right, 0) // BM * BM
    stop = tl.minimum(at + BN + left, q_len)
    inner = tl.maximum(tl.cdiv(tl.maximum(at + BN - 1 - right, 0), BM) * BM, start)
    inner = tl.minimum(inner, tl.maximum(tl.cdiv(stop, BM) * BM, start))
    whole = tl.maximum(tl.minimum(at + left + 1, q_len) // BM * BM, inner)
    dk_acc, dv_acc = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BDV], tl.float32)
    for i_g in range(0, group):
        i_h = i_kv * group + i_g
        logit = logit_of(per_head, i_h, scale, WAY)
        queries, grads = head_of(q, q_strides, i_b, i_h), head_of(grad, grad_strides, i_b, i_h)
        outer = tl.where(slope_in_range(logit, BN, WAY), whole, inner)
        gap = outer - inner
        dk_acc, dv_acc = _key_gradients(dk_acc, dv_acc, keys, queries, grads, (start, stop - gap, inner, gap), sides,
                                        q_len, logit, up, True, WAY, WIDTH, VALUE_WIDTH, BM, STAGES)  # fmt: skip
        dk_acc, dv_acc = _key_gradients(dk_acc, dv_acc, keys, queries, grads, (inner, outer, inner, gap), sides,
                                        q_len, logit, up, False, WAY, WIDTH, VALUE_WIDTH, BM, STAGES)  # fmt: skip
    store_rows(head_of(dk, dk_strides, i_b, i_kv), dk_acc * (scale / (up * 2.0**SHIFT)), n, kv_len, BN, WIDTH)
    store_rows(head_of(dv, dv_strides, i_b, i_kv), dv_acc * 2.0**-SHIFT, n, kv_len, BN, VALUE_WIDTH)
