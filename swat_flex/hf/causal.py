"""`SwatForCausalLM`: the language model, and the classifier beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from swat_flex.hf.cache import SwatCache
from swat_flex.hf.config import SwatModelConfig
from swat_flex.hf.model import SwatModel, SwatPreTrainedModel, keep_drawn
from swat_flex.nn import SwatTransformer
from swat_flex.nn.loss import IGNORED, head_cross_entropy

NO_PAGES = (
    "generate_batch: expected `generate`, which takes any batch, got continuous batching, whose pages swat_flex does "
    "not read"
)


class SwatForCausalLM(SwatPreTrainedModel, GenerationMixin):
    """A SWAT language model for transformers.

    `generate` keeps its keys in a `SwatCache`, in constant memory; any other cache gives the same tokens. The loss
    never makes all logits at once.

    >>> model = SwatForCausalLM(SwatModelConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, sliding_window=8,
    ...     num_attention_heads=4))
    >>> model.generate(torch.randint(100, (1, 4)), max_new_tokens=3, do_sample=False).shape
    torch.Size([1, 7])

    Args:
        config: the model's.
        transformer: takes over its parts; None draws new ones.

    Attributes:
        model: the `SwatModel`.
        lm_head: hidden states to logits.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 # transformers reads a dict
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: SwatModelConfig, transformer: SwatTransformer | None = None) -> None:
        super().__init__(config)
        drawn = SwatTransformer(config.to_swat()) if transformer is None else transformer
        self.model = SwatModel(config, drawn)
        self.lm_head = drawn.head
        if transformer is None:  # tied by transformers below, which else overlooks that a file lacks both
            self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach())
        keep_drawn(self)
        self.post_init()

    @classmethod
    def from_swat(cls, transformer: SwatTransformer, **kwargs: Any) -> SwatForCausalLM:
        """The same model, sharing its parameters; `.transformer` is the way back. kwargs as `SwatModelConfig`."""
        model = cls(SwatModelConfig.from_swat(transformer.config, **kwargs), transformer)
        model.train(transformer.training)
        return model

    @property
    def transformer(self) -> SwatTransformer:
        """The same model as a SwatTransformer, sharing its parameters."""
        with torch.device("meta"):
            swat = SwatTransformer(self.config.to_swat())
        model = self.model
        swat.embedding, swat.blocks, swat.norm, swat.head = model.embed_tokens, model.layers, model.norm, self.lm_head
        return swat.train(self.training)

    @deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits, and with labels the loss; other arguments as `SwatModel.forward`.

        Args:
            labels: int64 `[B, L]`, the tokens themselves; the shift is made here, −100 does not count.
            use_cache: as in `SwatModel.forward`, and None is no with labels too.
            logits_to_keep: of the last tokens alone, or of these indices; 0 is all.
            num_items_in_batch: what the summed loss is divided by; None is the tokens that count here.
            skip_logits: None is config.skip_logits in training with labels, where the logits of all tokens would need
                memory, else False.

        Returns:
            CausalLMOutputWithPast; logits are None where they were skipped. A loss_function set on the model gets all
            logits; without one `head_cross_entropy` computes the loss.
        """
        shifted, items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
        skip = kwargs.pop("skip_logits", None)
        counts = labels is not None or shifted is not None
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=False if labels is not None and use_cache is None else use_cache,
            **kwargs,
        )
        hidden = out.last_hidden_state
        loss = logits = None
        if counts and self.loss_function is not ForCausalLMLoss:
            loss = self.loss_function(
                logits=self.lm_head(hidden), labels=labels, vocab_size=self.config.vocab_size, shift_labels=shifted,
                num_items_in_batch=items, **kwargs,
            )  # fmt: skip
        elif counts:
            loss = self._loss(hidden, labels, shifted, items)
        if skip is None:
            skip = counts and self.training and self.config.skip_logits
        if not skip:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=out.cache, hidden_states=out.hidden_states)

    def _loss(
        self, hidden: Tensor, labels: Tensor | None, shifted: Tensor | None, items: Tensor | int | None
    ) -> Tensor:
        """The loss, with logits from the head module: what wraps it, such as LoRA or offloading, takes part."""
        if shifted is None:
            assert labels is not None
            shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        targets = shifted.to(hidden.device)
        vocabulary = self.config.vocab_size
        if items is None:
            return head_cross_entropy(hidden, self.lm_head, targets, vocabulary)
        items = items.to(hidden.device) if isinstance(items, Tensor) else items
        return head_cross_entropy(hidden, self.lm_head, targets, vocabulary, reduction="sum") / items

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: GenerationMode, *args: Any
    ) -> None:
        """Prepare a ring, unless the caller chose a cache or will take tokens back, which a ring cannot."""
        chosen = model_kwargs.get("cache") is not None or generation_config.cache_implementation is not None
        takes_back = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        if chosen or takes_back or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args)
        else:
            model_kwargs["cache"] = SwatCache(self.config)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Return the padding mask as it is, for the layers to read, instead of a four-dimensional one."""
        return attention_mask

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching, also `generate_batch`: its cache of pages has no window.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(NO_PAGES)


class SwatForSequenceClassification(GenericForSequenceClassification, SwatPreTrainedModel):
    """A SWAT model with a linear head on each row's last token."""
