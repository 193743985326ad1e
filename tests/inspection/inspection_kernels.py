"""Kernels to look at: small, and with facts that can be computed by hand."""

import torch
import triton
import triton.language as tl


@triton.jit
def attend_kernel(
    q, k, v, out, L, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr = 64, EXTRA: tl.constexpr = None
):
    """out_i = Σ_j exp2(scale·q_i·k_j) v_j over all j < L. Needs L a multiple of BN."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n, o_d = tl.arange(0, BN), tl.arange(0, D)
    b_q = tl.load(q + o_m[:, None] * D + o_d[None, :])  # [BM, D]
    b_out = tl.zeros([BM, D], tl.float32)
    for start in range(0, L, BN):
        b_k = tl.load(k + (start + o_n)[None, :] * D + o_d[:, None])  # [D, BN]
        b_v = tl.load(v + (start + o_n)[:, None] * D + o_d[None, :])  # [BN, D]
        b_x = tl.dot(b_q, b_k) * scale  # [BM, BN]
        b_out = tl.dot(tl.exp2(b_x).to(b_v.dtype), b_v, b_out)
    tl.store(out + o_m[:, None] * D + o_d[None, :], b_out.to(out.dtype.element_ty))


@triton.jit
def scale_kernel(x, out, n, scale, B: tl.constexpr):
    """out = scale·x; a float64 scale makes it a float64 product."""
    o_b = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + o_b, (tl.load(x + o_b, mask=o_b < n) * scale).to(out.dtype.element_ty), mask=o_b < n)


@triton.autotune(configs=[triton.Config({"B": 256})], key=["n"])
@triton.jit
def tuned_kernel(x, out, n, B: tl.constexpr):
    """out = x."""
    o_b = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + o_b, tl.load(x + o_b, mask=o_b < n), mask=o_b < n)


not_a_kernel = 3


def scale_case(n=1000):
    """Twice of 1,000 numbers, by eight blocks of 128."""
    x, out = torch.arange(1000.0), torch.full((1000,), float("nan"))
    scale_kernel[(8,)](x, out, n, 2.0, B=128)
    return {"out": (out, 2 * x.double())}


def overrun_case():
    """The same with a length that is one too many."""
    return scale_case(1001)


def idle_case():
    """Nothing at all."""
