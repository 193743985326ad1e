"""`register`: tell transformers of our model and our attention."""

from __future__ import annotations

import functools
import sys
from typing import Any

from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
)
from transformers.masking_utils import AttentionMaskInterface

from swat_flex.hf.attention import swat_attention
from swat_flex.hf.causal import NO_PAGES, SwatForCausalLM, SwatForSequenceClassification
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
    # `transformers serve` takes a model's class from there. Importing transformers may replace the module itself.
    setattr(sys.modules["transformers"], SwatForCausalLM.__name__, SwatForCausalLM)
    AttentionInterface.register(SwatModelConfig.model_type, swat_attention)
    AttentionMaskInterface.register(SwatModelConfig.model_type, swat_mask)
    if not hasattr(PreTrainedConfig.save_pretrained, "__wrapped__"):
        PreTrainedConfig.save_pretrained = _remembering(PreTrainedConfig.save_pretrained)
        GenerationMixin.init_continuous_batching = _refusing(GenerationMixin.init_continuous_batching)


def _remembering(save_pretrained: Any) -> Any:
    """Make configurations write attn_implementation where it is "swat_flex".

    transformers writes it nowhere, so a model trained with it would come back with a softmax and say nothing. Written,
    it comes back as it was, and a program that does not import this module gets an error instead.
    """

    @functools.wraps(save_pretrained)
    def save(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        used = _used_by(self)
        if not used:
            return save_pretrained(self, *args, **kwargs)
        self.attn_implementation = used
        try:
            return save_pretrained(self, *args, **kwargs)
        finally:
            del self.attn_implementation

    return save


def _refusing(init_continuous_batching: Any) -> Any:
    """Make continuous batching refuse models that use "swat_flex".

    Where a flash kernel is installed, transformers would switch them to it, a softmax, with a line in the log.
    """

    @functools.wraps(init_continuous_batching)
    def init(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _used_by(self.config):
            raise NotImplementedError(NO_PAGES)
        return init_continuous_batching(self, *args, **kwargs)

    return init


def _used_by(config: PreTrainedConfig) -> str | dict[str, str]:
    """The attn_implementation to write: "swat_flex", or which parts of a composite model use it, or nothing."""
    name = SwatModelConfig.model_type
    if config._attn_implementation == name:
        return name
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {key: name for key, part in parts.items() if getattr(part, "_attn_implementation", None) == name}
