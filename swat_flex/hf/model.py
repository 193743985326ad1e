"""`SwatForCausalLM`: `SwatTransformer` as transformers knows models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from swat_flex.decode import RingCache
from swat_flex.hf.cache import LayerOfCache, RingLayer, SwatCache
from swat_flex.hf.config import SwatModelConfig
from swat_flex.nn import SwatAttention, SwatTransformer, chunked_cross_entropy
from swat_flex.nn.attention import OtherCache
from swat_flex.nn.model import SwatBlock, SwiGLU
from swat_flex.positions import document_ids_from_cu_seqlens

IGNORED = -100  # label of a token that does not count


class SwatModel(PreTrainedModel):
    """A SWAT model without its logits. It keeps the head, so that its checkpoint is the language model's.

    Attributes:
        transformer: the `SwatTransformer`, which does the work; its state_dict is the model's without the prefix.
    """

    config_class = SwatModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SwatBlock"]  # noqa: RUF012 # transformers reads lists and dicts from the class
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SwatBlock}  # noqa: RUF012
    _tied_weights_keys = {"transformer.head.weight": "transformer.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: SwatModelConfig) -> None:
        super().__init__(config)
        self.transformer = SwatTransformer(config.to_swat())
        if not self.transformer.embedding.weight.is_meta:
            for module in self.transformer.modules():
                module._is_hf_initialized = True  # type: ignore[assignment] # drawn already: the same as SwatTransformer
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. On a CPU it maps weights at any multiple of 8 bytes, where matrix products may round
        differently: they move to aligned memory, so that a loaded model gives the saved one's logits to the bit."""
        loaded = super().from_pretrained(*args, **kwargs)
        for weight in (loaded[0] if isinstance(loaded, tuple) else loaded).parameters():
            if weight.device.type == "cpu" and weight.data_ptr() % 64:
                weight.data = weight.data.clone()
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Weights that a checkpoint lacks, as `SwatTransformer` draws them."""
        super()._init_weights(module)
        config = self.transformer.config
        parts = [part for part in self.transformer.modules() if isinstance(part, (SwatAttention, SwiGLU))]
        if any(module is (part.out if isinstance(part, SwatAttention) else part.down) for part in parts):
            initialization.normal_(module.weight, std=config.init_std / (2 * config.layers) ** 0.5)
        if isinstance(module, SwatAttention):
            slopes = config.head_slopes()
            if module.slopes is not None and slopes is not None:
                initialization.copy_(module.slopes, slopes)
            if module.logit_bias is not None:
                initialization.constant_(module.logit_bias, config.bias_of(module.window) or 0.0)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.transformer.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.transformer.head = new_embeddings

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states after the last norm.

        Args:
            input_ids: int `[B, L]`; or inputs_embeds `[B, L, hidden_size]`.
            attention_mask: `[B, N]`, 0 for padding, over all tokens since the start of the cache.
            position_ids: int `[B, L]` or `[1, L]`, for rope. Without attention_mask and cache a step other than +1
                starts a packed document.
            past_key_values: any `Cache`; the tokens are appended to it.
            use_cache: make a `SwatCache`. None is no in training and where position_ids, document_ids or labels are
                given, else config.use_cache.
            document_ids: int `[B, L]`, packed documents, a negative id is padding. Not with a cache.
            cu_seq_lens_q: int `[N + 1]`, packed documents of one row by their cumulative lengths.

        Returns:
            BaseModelOutputWithPast.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected either input_ids or inputs_embeds, got " + _both(input_ids))
        x = self.transformer.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        alone = not self.training and position_ids is None and document_ids is None and cu_seq_lens_q is None
        if past_key_values is None and (self.config.use_cache and alone if use_cache is None else use_cache):
            past_key_values = SwatCache(self.config)
        attention_mask = _boolean(attention_mask)
        if past_key_values is None:
            mask = attention_mask
            document_ids = _documents(document_ids, cu_seq_lens_q, position_ids, mask, x)
        elif document_ids is not None or cu_seq_lens_q is not None:
            raise ValueError("document_ids: expected None with a cache, which holds one document per row, got a tensor")
        else:
            mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :]
        if position_ids is not None:
            position_ids = position_ids.expand(x.shape[0], -1)
        caches = None if past_key_values is None else self._caches(past_key_values, attention_mask, x)
        hidden = self.transformer.features(x, document_ids, caches, position_ids, mask)
        for layer in [] if past_key_values is None else past_key_values.layers:
            if isinstance(layer, RingLayer):
                layer.seen += x.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def _caches(self, cache: Cache, attention_mask: Tensor | None, x: Tensor) -> Sequence[RingCache | OtherCache]:
        """What each layer reads: its ring, or an adapter of what the cache keeps."""
        config = self.transformer.config
        dtype = self.transformer.embedding.weight.dtype
        found: list[RingCache | OtherCache] = []
        for index, window in enumerate(config.windows):
            layer = cache.layers[index] if index < len(cache.layers) else None
            if isinstance(layer, RingLayer):
                if layer.window != window:
                    raise ValueError(f"past_key_values: expected window {window} in layer {index}, got {layer.window}")
                weight = next(self.transformer.blocks[index].parameters())  # layers may live on several devices
                device = x.device if weight.is_meta else weight.device
                found.append(layer.ring_for(x.shape[0], config.key_heads, config.channels, dtype, device))
            else:
                found.append(LayerOfCache(cache, index, window, attention_mask))
        return found


class SwatForCausalLM(SwatModel, GenerationMixin):
    """A SWAT language model for transformers.

    `generate` keeps its keys in a `SwatCache`, in constant memory; any other cache gives the same tokens. The loss
    never makes all logits at once.

    >>> model = SwatForCausalLM(SwatModelConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, sliding_window=8,
    ...     num_attention_heads=4))
    >>> model.generate(torch.randint(100, (1, 4)), max_new_tokens=3, do_sample=False).shape
    torch.Size([1, 7])
    """

    @classmethod
    def from_swat(cls, transformer: SwatTransformer, **kwargs: Any) -> SwatForCausalLM:
        """The same model, sharing its parameters; `.transformer` is the way back. kwargs as `SwatModelConfig`."""
        with torch.device("meta"):
            model = cls(SwatModelConfig.from_swat(transformer.config, **kwargs))
        model.transformer = transformer
        model.train(transformer.training)
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits, and with labels the loss; other arguments as `SwatModel.forward`.

        Args:
            labels: int64 `[B, L]`, the tokens themselves; the shift is made here, −100 does not count.
            logits_to_keep: of the last tokens alone, or of these indices; 0 is all.
            num_items_in_batch: what the summed loss is divided by; None is the tokens that count here.
            skip_logits: None is in training with labels, where the logits of all tokens would need memory.

        Returns:
            CausalLMOutputWithPast; logits are None where they were skipped.
        """
        shifted, items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
        skip = kwargs.pop("skip_logits", None)
        if labels is not None and use_cache is None:
            use_cache = False
        out = super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        hidden, head = out.last_hidden_state, self.transformer.head
        loss = logits = None
        if labels is not None and shifted is None:
            shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        if shifted is not None:
            targets = shifted.to(hidden.device)
            if items is None:
                loss = chunked_cross_entropy(hidden, head.weight, targets)
            else:
                items = items.to(hidden.device) if isinstance(items, Tensor) else items
                loss = chunked_cross_entropy(hidden, head.weight, targets, reduction="sum") / items
        if not (self.training and loss is not None if skip is None else skip):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = head(hidden[:, keep])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: GenerationMode, *args: Any
    ) -> None:
        """A ring, unless the caller chose a cache or will take tokens back, which a ring cannot."""
        chosen = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        takes_back = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        if chosen or takes_back or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args)
        else:
            model_kwargs["past_key_values"] = SwatCache(self.config)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """The padding mask as it is, where transformers would make one of four dimensions: each layer reads its own
        part of it."""
        return attention_mask


def _both(input_ids: Tensor | None) -> str:
    return "neither" if input_ids is None else "both"


def _boolean(attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [B, N] of 0 and 1, got shape {list(attention_mask.shape)}")
    return attention_mask.to(torch.bool)


def _documents(
    document_ids: Tensor | None, lengths: Tensor | None, position_ids: Tensor | None, mask: Tensor | None, x: Tensor
) -> Tensor | None:
    """Document ids by whichever name packing came."""
    if document_ids is not None:
        return document_ids
    if lengths is not None:
        if x.shape[0] != 1:
            raise ValueError(f"cu_seq_lens_q: expected a batch of one packed row, got {x.shape[0]} rows")
        return document_ids_from_cu_seqlens(lengths, x.shape[1]).expand(1, -1)
    if position_ids is None or mask is not None:
        return None
    step = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1)
    return (step != 1).cumsum(-1, dtype=torch.int32).expand(x.shape[0], -1)
