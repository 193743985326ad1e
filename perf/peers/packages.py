"""Packages that a user might install instead. Each is imported only when its adapter is asked for.

cuDNN's and triton-sigmoid's adapters were written from their sources (nvidia-cudnn-frontend 1.24.0, triton-sigmoid
0.1.2) and have not run yet: no GPU has been at hand. The check before timing is what decides there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perf.cases import Case, Definition, Passes
from perf.peers.peer import Peer, Run, needs_equal_heads, needs_half, needs_self_attention, slow_limit


def cudnn_left_bound(window: int) -> int:
    """diagonal_band_left_bound of cuDNN, which keeps what has column + bound > row: i − j < bound."""
    return window


class Cudnn(Peer):
    """cuDNN's attention with a sliding window, softmax, through nvidia-cudnn-frontend's PyTorch operator."""

    name = "cuDNN window"
    package = "cudnn.experimental.ops"
    cuda = True

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        return needs_half(case)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        from cudnn.experimental.ops import scaled_dot_product_attention

        options = {
            "is_causal": True,
            "enable_gqa": case.q_heads != case.kv_heads,
            "diagonal_alignment": 0 if case.q_len == case.kv_len else 1,  # top left, which more versions take
            "left_bound": cudnn_left_bound(case.window),
            "right_bound": 0,
        }

        return lambda: scaled_dot_product_attention(q, k, v, **options)


def fla_window(window: int) -> int:
    """window_size of flash-linear-attention's parallel_attn: keys [i − window_size + 1, i], as ours."""
    return window


class Fla(Peer):
    """flash-linear-attention's windowed softmax attention in Triton (fla-core)."""

    name = "fla window"
    package = "fla.ops.attn.parallel"
    cuda = True
    tokens_first = True

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        return needs_self_attention(case)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        from fla.ops.attn.parallel import parallel_attn

        window = fla_window(case.window)
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        return lambda: parallel_attn(queries, keys, values, window_size=window).transpose(1, 2)


class TritonSigmoid(Peer):
    """triton-sigmoid's dense kernel: a sigmoid over all keys, or all earlier ones; no window and no slopes."""

    package = "triton_sigmoid"
    cuda = True
    tokens_first = True

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.name = f"triton-sigmoid {'causal' if causal else 'dense'}"

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        return needs_self_attention(case) or needs_equal_heads(case)

    def definition(self, case: Case) -> Definition:
        return Definition(None if self.causal else (None, None), "sigmoid", None)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        from triton_sigmoid import sigmoid_attention

        options = {"is_causal": self.causal, "sigmoid_bias": 0.0}  # the bias is −log(L) by default; ours is 0
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        return lambda: sigmoid_attention(queries, keys, values, **options).transpose(1, 2)


def local_bucket(window: int) -> int:
    """window_size of local-attention with exact_windowsize: it counts the keys beside the query's own."""
    return window - 1


class LocalAttention(Peer):
    """local-attention, softmax, exact_windowsize, one bucket of look-back, no rotary embedding."""

    name = "local-attention"
    package = "local_attention"

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        if case.window == 1:
            return "has no window of the query alone"
        reason = needs_self_attention(case) or needs_equal_heads(case)
        return reason or slow_limit(case, device, self.definition(case))

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        from local_attention import LocalAttention as Layer

        layer = Layer(
            local_bucket(case.window), causal=True, look_backward=1, exact_windowsize=True, autopad=True,
            use_rotary_pos_emb=False,
        )  # fmt: skip
        return lambda: layer(q, k, v)
