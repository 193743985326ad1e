"""`register`: tell transformers of our model and our attention."""

from __future__ import annotations

from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.masking_utils import AttentionMaskInterface

from swat_flex.hf.attention import swat_attention
from swat_flex.hf.causal import SwatForCausalLM, SwatForSequenceClassification
from swat_flex.hf.config import SwatModelConfig
from swat_flex.hf.mask import swat_mask
from swat_flex.hf.model import SwatModel


def register() -> None:
    """Register "swat_flex" with the Auto classes and as an attention implementation; again does no harm.

    The attention function and its mask function go together: with the first alone, transformers ignores padding and
    packing.
    """
    AutoConfig.register(SwatModelConfig.model_type, SwatModelConfig, exist_ok=True)
    AutoModel.register(SwatModelConfig, SwatModel, exist_ok=True)
    AutoModelForCausalLM.register(SwatModelConfig, SwatForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(SwatModelConfig, SwatForSequenceClassification, exist_ok=True)
    AttentionInterface.register(SwatModelConfig.model_type, swat_attention)
    AttentionMaskInterface.register(SwatModelConfig.model_type, swat_mask)
