"""The backward kernels: one owns query rows and gives dq, one owns keys and gives dk and dv. Both recompute the tile.

With w = σ(x) and dw = ⟨do_i, v_j⟩ the logit's gradient is dx = dw·w·(1 − w), and

    dq_i = scale·Σ_j dx k_j    dk_j = scale·Σ_i dx q_i    dv_j = Σ_i w do_i    dslope = Σ dx·|i − j|    dbias = Σ dx

A sigmoid needs neither the output nor a row's sum to get there. Nothing is added atomically: runs repeat to the bit.

float16 rounds dx times `dx_scale`, a power of two that puts its bound just below the largest float16.
"""

import triton
import triton.language as tl

from swat_flex.backends.triton.tiles import (
    head_factors,
    head_of,
    is_gentle,
    load_rows,
    product,
    same_document,
    store_rows,
    visible,
    weigh,
)


@triton.jit
def _query_gradient(
    dq, dslope, dbias, q, grad, p_k, p_v, k_at, v_at, p_ids, q_ids, start, stop, inner, gap, first, left, right, kv_len,
    factor, slope, bias, dx_scale, HAS_SLOPES: tl.constexpr, BOTH_SIDES: tl.constexpr, DOCUMENTS: tl.constexpr,
    PER_HEAD: tl.constexpr, MASKED: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(dq, dslope, dbias) plus what the key tiles of [start, stop) give; dq lacks scale and has dx_scale.

    MASKED, tiles from `inner` on lie `gap` further right.
    """
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    rows, columns = (o_m - BM // 2).to(tl.float32), -o_n.to(tl.float32)
    for i_n in tl.range(start, stop, BN, num_stages=STAGES):
        n = i_n
        if MASKED:
            n = tl.where(i_n < inner, i_n, i_n + gap)
        k = load_rows(p_k, n, k_at, kv_len, BN, D, BD, MASKED)  # [BN, BD]
        v = load_rows(p_v, n, v_at, kv_len, BN, DV, BDV, MASKED)  # [BN, BDV]
        base = (first + BM // 2 - n).to(tl.float32)
        w = weigh(product(q, tl.trans(k)), rows, columns, base, factor, slope, bias, HAS_SLOPES, BOTH_SIDES, 0, KIND,
                  not (MASKED or DOCUMENTS))  # fmt: skip
        dx = product(grad, tl.trans(v)) * (w - w * w)  # [BM, BN]
        if MASKED or DOCUMENTS:
            seen = visible(first + o_m, n + o_n, left, right, kv_len, p_ids, q_ids, DOCUMENTS)
            dx = tl.where(seen, dx, 0.0)
        if PER_HEAD:
            dslope += tl.sum(dx * tl.abs((rows + base)[:, None] + columns[None, :]), 1)
            dbias += tl.sum(dx, 1)
        dq = product((dx * dx_scale).to(k.dtype), k, dq)
    return dq, dslope, dbias


@triton.jit(do_not_specialize=["q_len", "kv_len", "left", "right"])
def query_gradient_kernel(
    grad, q, k, v, slopes, logit_bias, document_ids, dx_scale, dq, partial, grad_strides, q_strides, k_strides,
    v_strides, dq_strides, q_len, kv_len, left, right, scale, q_heads, group, document_stride,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BOTH_SIDES: tl.constexpr,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, and for the per-head gradients one partial sum per program.

    Grid: (cdiv(Lq, BM)·Hq·B,), query tiles fastest; one program owns BM query rows of one query head.
    Reads: as the forward, and the rows of the output's gradient.
    Writes: each row of dq below Lq once; partial `[2, B·Hq·cdiv(Lq, BM)]` (dslope, dbias) unless it is None.
    Needs: strides in elements, order b h l d; dx_scale a pointer to one float32, or None for 1.
    """
    tiles = tl.cdiv(q_len, BM)
    i_m, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_b, i_h = i_bh // q_heads, i_bh % q_heads
    b, h = i_b.to(tl.int64), i_h.to(tl.int64)
    p_k, k_at = head_of(k, k_strides, i_b, i_h // group)
    p_v, v_at = head_of(v, v_strides, i_b, i_h // group)
    HAS_SLOPES: tl.constexpr = slopes is not None
    DOCUMENTS: tl.constexpr = document_ids is not None
    PER_HEAD: tl.constexpr = partial is not None
    factor, slope, bias = head_factors(slopes, logit_bias, i_h, scale, 0, KIND)
    up = 1.0
    if dx_scale is not None:
        up = tl.load(dx_scale)

    row = i_m * BM
    first = row + kv_len - q_len
    queries = load_rows(q + b * q_strides[0] + h * q_strides[1], row, q_strides, q_len, BM, D, BD, True)
    grads = load_rows(grad + b * grad_strides[0] + h * grad_strides[1], row, grad_strides, q_len, BM, DV, BDV, True)
    p_ids, q_ids = document_ids, 0
    if DOCUMENTS:
        p_ids = document_ids + b * document_stride
        o_i = first + tl.arange(0, BM)
        q_ids = tl.load(p_ids + o_i, mask=o_i < kv_len, other=-1)[:, None]

    start = tl.maximum(first - left, 0) // BN * BN
    stop = tl.minimum(first + BM + right, kv_len)
    inner = tl.minimum(tl.maximum(tl.cdiv(first + BM - 1 - left, BN) * BN, start), tl.cdiv(stop, BN) * BN)
    outer = tl.maximum(tl.minimum(first + right + 1, kv_len) // BN * BN, inner)
    outer = tl.where(is_gentle(slope, BM, BOTH_SIDES, KIND), outer, inner)
    gap = outer - inner
    acc, dslope, dbias = tl.zeros([BM, BD], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    acc, dslope, dbias = _query_gradient(
        acc, dslope, dbias, queries, grads, p_k, p_v, k_at, v_at, p_ids, q_ids, start, stop - gap, inner, gap, first,
        left, right, kv_len, factor, slope, bias, up, HAS_SLOPES, BOTH_SIDES, DOCUMENTS, PER_HEAD, True, KIND, D, DV,
        BD, BDV, BM, BN, STAGES)  # fmt: skip
    acc, dslope, dbias = _query_gradient(
        acc, dslope, dbias, queries, grads, p_k, p_v, k_at, v_at, p_ids, q_ids, inner, outer, inner, gap, first,
        left, right, kv_len, factor, slope, bias, up, HAS_SLOPES, BOTH_SIDES, DOCUMENTS, PER_HEAD, False, KIND, D, DV,
        BD, BDV, BM, BN, STAGES)  # fmt: skip
    p_dq = dq + b * dq_strides[0] + h * dq_strides[1]
    store_rows(p_dq, acc * (scale / up), row, dq_strides, q_len, BM, D, BD)
    if PER_HEAD:
        tl.store(partial + tl.program_id(0), tl.sum(dslope, 0))
        tl.store(partial + tl.num_programs(0) + tl.program_id(0), tl.sum(dbias, 0))


@triton.jit
def _key_gradients(
    dk, dv, k, v, p_q, p_grad, q_at, grad_at, p_ids, k_ids, start, stop, inner, gap, n, offset, left, right, q_len,
    factor, slope, bias, dx_scale, HAS_SLOPES: tl.constexpr, BOTH_SIDES: tl.constexpr, DOCUMENTS: tl.constexpr,
    MASKED: tl.constexpr, SHIFT: tl.constexpr, KIND: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(dk, dv) of the keys n … n + BN plus what the query tiles of [start, stop) give, scaled as in the kernel.

    MASKED, tiles from `inner` on lie `gap` further down.
    """
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    rows, columns = (BN // 2 - o_n).to(tl.float32), o_m.to(tl.float32)
    for i_m in tl.range(start, stop, BM, num_stages=STAGES):
        m = i_m
        if MASKED:
            m = tl.where(i_m < inner, i_m, i_m + gap)
        q = load_rows(p_q, m, q_at, q_len, BM, D, BD, MASKED)  # [BM, BD]
        grad = load_rows(p_grad, m, grad_at, q_len, BM, DV, BDV, MASKED)  # [BM, BDV]
        base = (m + offset - n - BN // 2).to(tl.float32)
        s = product(k, tl.trans(q))
        dw = product(v, tl.trans(grad))
        w = weigh(s, rows, columns, base, factor, slope, bias, HAS_SLOPES, BOTH_SIDES, SHIFT,
                  KIND, not (MASKED or DOCUMENTS))  # fmt: skip
        if MASKED or DOCUMENTS:
            d = (m + offset - n + o_m)[None, :] - o_n[:, None]
            seen = (d + right).to(tl.uint32) <= (left + right).to(tl.uint32)  # −right ≤ d ≤ left
            if DOCUMENTS:
                p_q_ids = p_ids + m + offset + o_m
                seen &= same_document(tl.load(p_q_ids, mask=m + o_m < q_len, other=-1)[None, :], k_ids)
            w = tl.where(seen, w, 0.0)
        dv = product(w.to(grad.dtype), grad, dv)
        dx = dw * (w - w * (w * 2.0**-SHIFT))  # [BN, BM], times 2^SHIFT
        if MASKED or DOCUMENTS:
            dx = tl.where(w == 0.0, 0.0, dx)  # hidden: not even NaN from an unseen value
        dk = product((dx * dx_scale).to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["q_len", "kv_len", "left", "right"])
def key_gradients_kernel(
    grad, q, k, v, slopes, logit_bias, document_ids, dx_scale, dk, dv, grad_strides, q_strides, k_strides, v_strides,
    dk_strides, dv_strides, q_len, kv_len, left, right, scale, q_heads, group, document_stride,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BOTH_SIDES: tl.constexpr,
    SHIFT: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv, summed over the query heads that share a key head.

    Grid: (cdiv(Lk, BN)·Hkv·B,), key tiles fastest; one program owns BN keys of one key head.
    Reads: query tiles that touch the band, for each query head of the group in turn: edges masked, then the interior.
    Writes: each row of dk and dv below Lk once, keys that nobody sees as 0.
    Needs: strides in elements, order b h l d; dx_scale a pointer to one float32, or None for 1.
    """
    tiles, kv_heads = tl.cdiv(kv_len, BN), q_heads // group
    i_n, i_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_b, i_kv = i_bh // kv_heads, i_bh % kv_heads
    b, kv = i_b.to(tl.int64), i_kv.to(tl.int64)
    HAS_SLOPES: tl.constexpr = slopes is not None
    DOCUMENTS: tl.constexpr = document_ids is not None
    up = 1.0
    if dx_scale is not None:
        up = tl.load(dx_scale)
    up = up * 2.0**-SHIFT

    n, offset = i_n * BN, kv_len - q_len
    keys = load_rows(k + b * k_strides[0] + kv * k_strides[1], n, k_strides, kv_len, BN, D, BD, True)
    values = load_rows(v + b * v_strides[0] + kv * v_strides[1], n, v_strides, kv_len, BN, DV, BDV, True)
    p_ids, k_ids = document_ids, 0
    if DOCUMENTS:
        p_ids = document_ids + b * document_stride
        o_j = n + tl.arange(0, BN)
        k_ids = tl.load(p_ids + o_j, mask=o_j < kv_len, other=-1)[:, None]

    # Query rows that see a key of the tile: [start, stop). Every row of [inner, outer) sees every key.
    start = tl.maximum(n - right - offset, 0) // BM * BM
    stop = tl.minimum(n + BN + left - offset, q_len)
    inner = tl.maximum(tl.cdiv(tl.maximum(n + BN - 1 - right - offset, 0), BM) * BM, start)
    inner = tl.minimum(inner, tl.maximum(tl.cdiv(stop, BM) * BM, start))
    whole = tl.maximum(tl.minimum(n + left + 1 - offset, q_len) // BM * BM, inner)
    dk_acc, dv_acc = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BDV], tl.float32)
    for i_g in range(0, group):
        h = i_kv * group + i_g
        factor, slope, bias = head_factors(slopes, logit_bias, h, scale, SHIFT, KIND)
        p_q, q_at = head_of(q, q_strides, i_b, h)
        p_grad, grad_at = head_of(grad, grad_strides, i_b, h)
        outer = tl.where(is_gentle(slope, BN, BOTH_SIDES, KIND), whole, inner)
        gap = outer - inner
        dk_acc, dv_acc = _key_gradients(
            dk_acc, dv_acc, keys, values, p_q, p_grad, q_at, grad_at, p_ids, k_ids, start, stop - gap, inner, gap, n,
            offset, left, right, q_len, factor, slope, bias, up, HAS_SLOPES, BOTH_SIDES, DOCUMENTS, True, SHIFT, KIND,
            D, DV, BD, BDV, BM, BN, STAGES)  # fmt: skip
        dk_acc, dv_acc = _key_gradients(
            dk_acc, dv_acc, keys, values, p_q, p_grad, q_at, grad_at, p_ids, k_ids, inner, outer, inner, gap, n,
            offset, left, right, q_len, factor, slope, bias, up, HAS_SLOPES, BOTH_SIDES, DOCUMENTS, False, SHIFT, KIND,
            D, DV, BD, BDV, BM, BN, STAGES)  # fmt: skip
    p_dk, p_dv = dk + b * dk_strides[0] + kv * dk_strides[1], dv + b * dv_strides[0] + kv * dv_strides[1]
    store_rows(p_dk, dk_acc * (scale / (up * 2.0**SHIFT)), n, dk_strides, kv_len, BN, D, BD)
    store_rows(p_dv, dv_acc * 2.0**-SHIFT, n, dv_strides, kv_len, BN, DV, BDV)
