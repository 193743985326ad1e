"""`SwatModel`: the layers of `SwatTransformer` as transformers knows models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.output_capturing import capture_outputs

from swat_flex.decode import RingCache
from swat_flex.hf.adapters import tell_peft
from swat_flex.hf.cache import LayerOfCache, RingLayer, SwatCache
from swat_flex.hf.config import SwatModelConfig, refuse_attentions
from swat_flex.hf.square import is_square, square_documents
from swat_flex.nn import SwatAttention, SwatTransformer
from swat_flex.nn.attention import KeyValueCache
from swat_flex.nn.model import SwatBlock, SwiGLU
from swat_flex.positions import document_ids_from_cu_seqlens

# Names in a file → names here, as patterns: the files of this library's first exports, then those of Llama's kind.
FILE_NAMES = {
    r"^transformer\.embedding\.": "model.embed_tokens.",
    r"^transformer\.blocks\.": "model.layers.",
    r"^transformer\.norm\.": "model.norm.",
    r"^transformer\.head\.": "lm_head.",
    r"\.self_attn\.q_proj\.": ".attention.query.",
    r"\.self_attn\.k_proj\.": ".attention.key.",
    r"\.self_attn\.v_proj\.": ".attention.value.",
    r"\.self_attn\.o_proj\.": ".attention.out.",
    r"\.self_attn\.q_norm\.": ".attention.query_norm.",
    r"\.self_attn\.k_norm\.": ".attention.key_norm.",
    r"\.mlp\.(gate|up|down)_proj\.": r".mlp.\1.",
    r"\.input_layernorm\.": ".attention_norm.",
    r"\.post_attention_layernorm\.": ".mlp_norm.",
}

MODULE = "modeling_swat_flex"  # in a saved folder
AUTO_CLASSES = {
    "AutoConfig": "SwatModelConfig",
    "AutoModel": "SwatModel",
    "AutoModelForCausalLM": "SwatForCausalLM",
    "AutoModelForSequenceClassification": "SwatForSequenceClassification",
}


class SwatLayer(GradientCheckpointingLayer, SwatBlock):
    """The parts of a `SwatBlock` as a layer that transformers can checkpoint."""

    def __init__(self, block: nn.Module) -> None:
        nn.Module.__init__(self)
        for name, part in block.named_children():
            self.add_module(name, part)


class SwatPreTrainedModel(PreTrainedModel):
    """Base of the SWAT models for transformers: configuration, drawing, loading and saving of weights."""

    config_class = SwatModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SwatLayer"]  # noqa: RUF012 # transformers reads lists and dicts from the class
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SwatLayer}  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, and as well files with the names of Llama's parts or of this library's first
        exports (`FILE_NAMES`).

        On a CPU transformers maps weights at any multiple of 8 bytes, where matrix products may round differently: they
        move to aligned memory, so that a loaded model gives the saved one's logits to the bit.
        """
        kwargs.setdefault("key_mapping", FILE_NAMES)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._weight_conversions = []  # saved again, it has today's names
        for weight in model.parameters():
            if weight.device.type == "cpu" and weight.data_ptr() % 64:
                weight.data = weight.data.clone()
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with a module that names the classes, so that trust_remote_code=True loads the
        folder in a program that does not import swat_flex.hf."""
        self.config.auto_map = {name: f"{MODULE}.{found}" for name, found in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            module = f"from swat_flex.hf import {', '.join(sorted(AUTO_CLASSES.values()))}  # noqa: F401\n"
            Path(save_directory, f"{MODULE}.py").write_text(module)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: no code is copied when a model is saved, its folder names this library."""

    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights that a checkpoint lacks as `SwatTransformer` draws them."""
        super()._init_weights(module)
        config = self.config.to_swat()
        for part in self.modules():
            if isinstance(part, SwatAttention | SwiGLU) and module is (
                part.out if isinstance(part, SwatAttention) else part.down
            ):
                initialization.normal_(module.weight, std=config.init_std / (2 * config.layers) ** 0.5)
        if isinstance(module, SwatAttention):
            slopes = config.head_slopes()
            if module.slopes is not None and slopes is not None:
                initialization.copy_(module.slopes, slopes)
            if module.logit_bias is not None:
                bias = config.bias_of(module.window)
                initialization.copy_(module.logit_bias, torch.as_tensor(0.0 if bias is None else bias))


class SwatModel(SwatPreTrainedModel):
    """A SWAT model without its head.

    Args:
        config: the model's.
        transformer: takes over its parts; None draws new ones.

    Attributes:
        embed_tokens, layers, norm: the embedding, blocks and norm of a `SwatTransformer`.
    """

    def __init__(self, config: SwatModelConfig, transformer: SwatTransformer | None = None) -> None:
        super().__init__(config)
        tell_peft()
        transformer = SwatTransformer(config.to_swat()) if transformer is None else transformer
        self.embed_tokens = transformer.embedding
        self.layers = nn.ModuleList(SwatLayer(block) for block in transformer.blocks)
        self.norm = transformer.norm
        self.gradient_checkpointing = False
        keep_drawn(self)
        self.post_init()

    @deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        document_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states after the last norm.

        Args:
            input_ids: int `[B, L]`; or inputs_embeds `[B, L, hidden_size]`.
            attention_mask: `[B, N]`, 0 for padding, over all tokens since the start of the cache. Or, without a cache,
                `[B, 1, L, L]` that shows documents and padding (`square_documents`); each layer's window holds too.
            position_ids: int `[B, L]` or `[1, L]`, for rope. Without attention_mask and cache a step other than +1
                starts a packed document.
            cache: any `Cache`; the tokens are appended to it.
            use_cache: make a `SwatCache`. None is no in training and where position_ids or document_ids are given, else
                config.use_cache.
            document_ids: int `[B, L]`, packed documents, a negative id is padding. Not with a cache.
            cu_seq_lens_q: int `[N + 1]`, packed documents of one row by their cumulative lengths.

        Returns:
            BaseModelOutputWithPast.

        Raises:
            ValueError: an argument that breaks a rule above.
            NotImplementedError: output_attentions, as attention weights never exist.
        """
        refuse_attentions(self.config, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids: expected either input_ids or inputs_embeds, got {given}")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and is_square(attention_mask):
            if cache is not None or use_cache or document_ids is not None or cu_seq_lens_q is not None:
                raise ValueError("attention_mask: expected [B, N] with a cache or documents, got four dimensions")
            document_ids, attention_mask = self._documents_of_square(attention_mask, x), None
        alone = not self.training and position_ids is None and document_ids is None and cu_seq_lens_q is None
        if cache is None and (self.config.use_cache and alone if use_cache is None else use_cache):
            cache = SwatCache(self.config)
        attention_mask = _boolean(attention_mask)
        mask = attention_mask
        if cache is None:
            document_ids = _documents(document_ids, cu_seq_lens_q, position_ids, mask, x)
        elif document_ids is not None or cu_seq_lens_q is not None:
            raise ValueError("document_ids: expected None with a cache, which holds one document per row, got a tensor")
        elif attention_mask is not None:
            mask = attention_mask[:, -x.shape[1] :]
        if position_ids is not None:
            position_ids = position_ids.expand(x.shape[0], -1)
        caches = [None] * len(self.layers) if cache is None else self._caches(cache, attention_mask, x)
        for layer, own in zip(self.layers[: self.config.num_hidden_layers], caches, strict=False):
            x = layer(x, document_ids, cache=own, positions=position_ids, mask=mask)
        for part in [] if cache is None else cache.layers:
            if isinstance(part, RingLayer):
                part.seen += x.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), cache=cache)

    def _documents_of_square(self, mask: Tensor, x: Tensor) -> Tensor:
        ids, window = square_documents(mask, x.shape[0], x.shape[1], x.shape[1])
        wider = [own for own in self.config.layer_windows if window is not None and (own is None or own > window)]
        if wider:
            raise NotImplementedError(
                f"attention_mask: expected documents without a window or with at least each layer's, {wider[0]}, got a "
                f"mask with window {window}"
            )
        return ids

    def _caches(self, cache: Cache, attention_mask: Tensor | None, x: Tensor) -> Sequence[RingCache | KeyValueCache]:
        """The cache of each layer: its ring, or an adapter of what another cache keeps."""
        config = self.config.to_swat()
        found: list[RingCache | KeyValueCache] = []
        for index, window in enumerate(config.windows):
            layer = cache.layers[index] if index < len(cache.layers) else None
            if isinstance(layer, RingLayer):
                if layer.window != window:
                    raise ValueError(f"cache: expected window {window} in layer {index}, got {layer.window}")
                weight = next(self.layers[index].parameters())  # layers may live on several devices
                device = x.device if weight.is_meta else weight.device
                found.append(layer.ring_for(x.shape[0], config.key_heads, config.channels, self.dtype, device))
            else:
                found.append(LayerOfCache(cache, index, window, attention_mask))
        return found


def keep_drawn(model: nn.Module) -> None:
    """Tell transformers that the weights of `model` have been drawn, unless they are on the meta device."""
    for module in model.modules():
        if not any(weight.is_meta for weight in module.parameters(recurse=False)):
            module._is_hf_initialized = True  # type: ignore[assignment] # a plain attribute


def _boolean(attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [B, N] of 0 and 1, got shape {list(attention_mask.shape)}")
    return attention_mask.to(torch.bool)


def _documents(
    document_ids: Tensor | None, lengths: Tensor | None, position_ids: Tensor | None, mask: Tensor | None, x: Tensor
) -> Tensor | None:
    """Document ids of packed rows, however the packing was given."""
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
