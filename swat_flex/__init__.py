"""Sliding-window sigmoid attention (SWAT, arXiv 2502.18845)."""

from swat_flex.api import Explanation, explain, flex_swat
from swat_flex.decode import RingCache, swat_decode, swat_prefill
from swat_flex.nn import SwatAttention, SwatConfig, SwatTransformer
from swat_flex.positions import (
    alibi_slopes,
    apply_rope,
    balanced_alibi_slopes,
    document_ids_from_attention_mask,
    document_ids_from_cu_seqlens,
    unit_logit_bias,
)
from swat_flex.reference import naive_swat
from swat_flex.tuning import Tuned, tune

__version__ = "0.2.0.dev0"

__all__ = [
    "Explanation",
    "RingCache",
    "SwatAttention",
    "SwatConfig",
    "SwatTransformer",
    "Tuned",
    "alibi_slopes",
    "apply_rope",
    "balanced_alibi_slopes",
    "document_ids_from_attention_mask",
    "document_ids_from_cu_seqlens",
    "explain",
    "flex_swat",
    "naive_swat",
    "swat_decode",
    "swat_prefill",
    "tune",
    "unit_logit_bias",
]
