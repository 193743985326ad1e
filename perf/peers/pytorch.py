"""What PyTorch itself offers: SDPA, FlexAttention's softmax, its FlashAttention-2."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.cases import Case, Definition, Passes
from perf.peers.peer import Peer, Run, dense_limit, needs_half, needs_self_attention, slow_limit
from swat_flex import balanced_alibi_slopes
from swat_flex.window import Window


class SdpaBand(Peer):
    """SDPA with a boolean mask of the band: right, and quadratic in work and in the mask's memory."""

    name = "SDPA band mask"

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        return dense_limit(case, device, 2 if device.type == "cpu" else 1)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        mask = band_mask(case, q.device)
        grouped = case.q_heads != case.kv_heads
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def band_mask(case: Case, device: torch.device) -> Tensor:
    """Bool `[Lq, Lk]`: key j with 0 ≤ i − j < window; the last query sits at the last key."""
    i = torch.arange(case.kv_len - case.q_len, case.kv_len, device=device)
    return Window.of(case.window).sees(i[:, None] - torch.arange(case.kv_len, device=device))


class SdpaCausal(Peer):
    """SDPA over all earlier keys: what the window saves is measured against this."""

    name = "SDPA causal"

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        return needs_self_attention(case) or slow_limit(case, device, self.definition(case))

    def definition(self, case: Case) -> Definition:
        return Definition(None, "softmax", None)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        grouped = case.q_heads != case.kv_heads
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class SdpaRing(Peer):
    """SDPA over a ring buffer of the last `window` keys: a softmax without positions needs no order and no mask."""

    name = "SDPA ring"
    copies = True

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        return None if case.q_len == 1 else "several queries see different keys of one ring"

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        keys, values = (x[:, :, -case.window :].contiguous() for x in (k, v))
        grouped = case.q_heads != case.kv_heads
        return lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped)


class FlexSoftmax(Peer):
    """Compiled FlexAttention, its own softmax, on the same band."""

    name = "FlexAttention softmax"

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        if device.type == "cpu" and passes == "both":
            return "FlexAttention has no backward on a CPU"
        limit = 8192 if device.type == "cpu" else 32768  # create_block_mask looks at every pair, in int64
        too_long = f"its BlockMask is built from all {case.q_len:,}² pairs" if case.q_len > limit else None
        return needs_self_attention(case) or too_long

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask

        window = case.window

        def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < window)

        blocks = create_block_mask(band, None, None, case.q_len, case.kv_len, device=str(q.device))
        attend, grouped = _own_flex_attention(), case.q_heads != case.kv_heads
        return lambda: attend(q, k, v, block_mask=blocks, enable_gqa=grouped)


def _own_flex_attention() -> Callable[..., Tensor]:
    """flex_attention compiled under a code object of its own, of which torch compiles only eight."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q, k, v, **options):  # type: ignore[no-untyped-def]  # compiled
        return flex_attention(q, k, v, **options)

    own = types.FunctionType(attend.__code__.replace(), attend.__globals__, closure=attend.__closure__)
    return torch.compile(own, dynamic=False)


def flash_window(window: int) -> tuple[int, int]:
    """(window_size_left, window_size_right) of FlashAttention, which counts the keys beside the query's own."""
    return window - 1, 0


def flash_slopes(slopes: Tensor) -> Tensor:
    """FlashAttention subtracts alibi_slopes·|i − j|: our slopes with the sign turned."""
    return -slopes


class FlashAttention2(Peer):
    """PyTorch's own copy of FlashAttention-2, softmax, with a window."""

    name = "FlashAttention-2 window"
    tokens_first = True
    cuda = True
    slopes: Literal["balanced"] | None = None

    def available(self, device: torch.device) -> str | None:
        if not hasattr(torch.ops.aten, "_flash_attention_forward"):
            return "this torch has no _flash_attention_forward"
        return super().available(device)

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        return needs_half(case)

    def definition(self, case: Case) -> Definition:
        return Definition(case.window, "softmax", self.slopes)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        left, right = flash_window(case.window)
        slopes = flash_slopes(balanced_alibi_slopes(case.q_heads, device=q.device)) if self.slopes else None
        options = {"window_size_left": left, "window_size_right": right, "alibi_slopes": slopes}
        lengths = (None, None, case.q_len, case.kv_len)

        attend = torch.ops.aten._flash_attention_forward
        # dropout 0, causal, no debug mask
        return lambda: attend(queries, keys, values, *lengths, 0.0, True, False, **options)[0].transpose(1, 2)


class FlashAttention2Alibi(FlashAttention2):
    """The same with ALiBi; torch's backward of it takes no slopes, so it has none that is right."""

    name = "FlashAttention-2 window, ALiBi"
    slopes = "balanced"

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        if passes == "both":
            return "torch's _flash_attention_backward takes no alibi_slopes"
        return needs_half(case)
