"""transformers: SWAT models under the Auto classes, and `attn_implementation="swat_flex"` for its own models.

Importing this registers both (`register`).
"""

from swat_flex.hf.attention import swat_attention
from swat_flex.hf.cache import RingLayer, SwatCache
from swat_flex.hf.causal import SwatForCausalLM, SwatForSequenceClassification
from swat_flex.hf.config import SwatModelConfig
from swat_flex.hf.mask import swat_mask
from swat_flex.hf.model import SwatModel
from swat_flex.hf.register import register

__all__ = [
    "RingLayer",
    "SwatCache",
    "SwatForCausalLM",
    "SwatForSequenceClassification",
    "SwatModel",
    "SwatModelConfig",
    "register",
    "swat_attention",
    "swat_mask",
]

register()
