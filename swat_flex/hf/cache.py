"""`SwatCache`: transformers' cache in constant memory, a `RingCache` per windowed layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from swat_flex.decode import RingCache
from swat_flex.hf.mask import aligned, swat_mask


class RingLayer(CacheLayerMixin):
    """A layer's `RingCache`: `window` slots per row, whatever the length.

    `SwatForCausalLM` attends to the ring itself. Any other model gets from `update` what transformers' own sliding
    cache gives it: the window − 1 keys before the new ones, and those.

    Args:
        window: keys per query, its own included.
        queries: most new tokens that are decoded at once, 1 to 16.

    Attributes:
        ring: the `RingCache`; None before the first tokens.
        seen: tokens appended so far, padding included.
    """

    is_sliding = True
    is_compileable = False  # a step can be compiled; this keeps generate on CUDA from doing so unasked
    supports_early_init = False

    def __init__(self, window: int, queries: int = 1) -> None:
        super().__init__()
        self.window, self.queries = window, queries
        self.ring: RingCache | None = None
        self.seen = 0

    def ring_for(self, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> RingCache:
        """Return the ring, which the first call makes."""
        if self.ring is None:
            self._keep(RingCache(batch, heads, self.window, head_dim, None, dtype, device, queries=self.queries))
        assert self.ring is not None
        return self.ring

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        dtype, device, value_dim = key_states.dtype, key_states.device, value_states.shape[3]
        self._keep(RingCache(batch, heads, self.window, head_dim, value_dim, dtype, device, queries=self.queries))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append T tokens; `[B, H, min(window − 1, seen) + T, D]` keys and values, the new ones last."""
        if self.ring is None:
            self.lazy_initialization(key_states, value_states)
        assert self.ring is not None
        past = min(self.window - 1, self.seen)
        slot = torch.arange(self.seen - past, self.seen, device=key_states.device) % self.ring.slots
        keys = torch.cat((self.ring.keys.index_select(2, slot), key_states), 2)
        values = torch.cat((self.ring.values.index_select(2, slot), value_states), 2)
        self.ring.append(key_states, value_states)
        self.seen += key_states.shape[2]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = min(self.window - 1, self.seen)
        return past + query_length, self.seen - past

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.window

    def reset(self) -> None:
        self.seen = 0
        if self.ring is not None:
            self.ring.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.ring is not None:
            self.ring.reorder(beam_idx.to(self.ring.length.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.ring is not None:
            self._take(torch.arange(len(self.ring.length), device=self.ring.length.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.ring is not None:
            self._take(torch.arange(len(self.ring.length), device=self.ring.length.device)[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                f"tokens_to_remove: expected 0 with a ring, which has overwritten what came before, got "
                f"{tokens_to_remove}; use a DynamicCache"
            )

    def offload(self) -> None:
        """Do nothing: a ring is small."""

    def prefetch(self) -> None:
        """Do nothing: a ring is never offloaded."""

    def _take(self, index: Tensor) -> None:
        """Keep rows `index` alone, as a batch of another size."""
        ring = self.ring
        assert ring is not None
        with torch.inference_mode(False):  # as the ring's own buffers
            kept = (x.index_select(0, index) for x in (ring.keys, ring.values, ring.length))
            ring.keys, ring.values, ring.length = kept
        self._keep(ring)

    def _keep(self, ring: RingCache) -> None:
        self.ring, self.keys, self.values, self.is_initialized = ring, ring.keys, ring.values, True


class SwatCache(Cache):
    """A cache whose memory does not grow: rings for the layers with a window, growing keys for those without.

    The default of `SwatForCausalLM.generate`; any model with sliding-window layers can be given one.

    Args:
        config: of the model.
        queries: most new tokens that are decoded at once, 1 to 16.

    Raises:
        NotImplementedError: a layer that is neither sliding-window nor full attention.
    """

    def __init__(self, config: Any, queries: int = 1) -> None:
        config = config.get_text_config(decoder=True)
        super().__init__(
            layers=[DynamicLayer() if window is None else RingLayer(window, queries) for window in windows_of(config)]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        kept = [layer for layer in self.layers if layer.is_initialized]
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in kept)


def windows_of(config: Any) -> list[int | None]:
    """Keys per query of each layer of any transformers model; None is all of them."""
    own = getattr(config, "layer_windows", None)
    if own is not None:
        return list(own)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise NotImplementedError(f"config: expected sliding or full attention in every layer, got {kind!r}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


class LayerOfCache:
    """One layer of any transformers cache, as the `KeyValueCache` that `SwatAttention` reads.

    attention_mask is bool `[B, N]` over all tokens since the start.
    """

    def __init__(self, cache: Cache, layer: int, window: int | None, attention_mask: Tensor | None) -> None:
        self.cache, self.layer, self.window, self.attention_mask = cache, layer, window, attention_mask

    def positions(self, tokens: int, mask: Tensor | None = None) -> Tensor:
        """Positions `[tokens]` of the next tokens for rope, which tells only differences: padding may count."""
        seen = self.cache.get_seq_length(self.layer)
        device = seen.device if isinstance(seen, Tensor) else None if mask is None else mask.device
        positions: Tensor = torch.arange(tokens, device=device) + seen
        return positions

    def update(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append k and v. Returns keys, values and document_ids for `flex_swat`."""
        tokens = k.shape[2]
        offset = self.cache.get_query_offset(self.layer)
        slots, first = self.cache.get_mask_sizes(tokens, self.layer)
        said = swat_mask(k.shape[0], tokens, slots, offset, first, attention_mask=self.attention_mask, device=k.device)
        keys, values = self.cache.update(k, v, self.layer)
        return aligned(keys, values, said, self.window, tokens)
