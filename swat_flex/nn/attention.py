"""`SwatAttention`: projections, rotary embedding and slopes around `flex_swat`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from swat_flex.api import flex_swat
from swat_flex.decode import RingCache, swat_decode, swat_prefill
from swat_flex.nn.config import Slopes, SwatConfig, bias_for, slopes_for
from swat_flex.positions import apply_rope, document_ids_from_attention_mask, per_head_dtype

if TYPE_CHECKING:
    from swat_flex.distributed import Shard


class KeyValueCache(Protocol):
    """Keys and values of one layer, kept in whatever way: what `SwatAttention` needs of a cache that is no ring."""

    def positions(self, tokens: int, mask: Tensor | None = None) -> Tensor:
        """`[tokens]` or `[B, tokens]`: positions of the next tokens, for rope."""

    def update(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append k and v. Returns keys, values and document_ids for `flex_swat`; the last key is the last new one."""


class SwatAttention(nn.Module):
    """Attention of one layer: out = W_o · root(flex_swat(rope(norm(W_q x)), rope(norm(W_k x)), W_v x)).

    Key j is visible to query i when 0 ≤ i − j < window. Slopes that are not learnt are computed where they are used: no
    buffer, so a cast of the module cannot round them and a meta device cannot lose them.

    Args:
        config: the model's.
        layer: which of its layers this is; it decides the window.

    Attributes:
        window: keys per query, its own included; None is all of them.
        attend: what computes the output where there is no cache: `flex_swat`, or a function with its arguments that an
            experiment puts in its place.
        slopes: `[heads]`, logits per token of distance, where they are learnt; else None.
        logit_bias: `[heads]`, where it is learnt; else None.
    """

    slopes: Tensor | None
    logit_bias: Tensor | None

    def __init__(self, config: SwatConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.window = config.windows[layer]
        self.attend: Callable[..., Tensor] = flex_swat
        width, channels = config.hidden_size, config.channels
        self.query = nn.Linear(width, config.heads * channels, bias=False)
        self.key = nn.Linear(width, config.key_heads * channels, bias=False)
        self.value = nn.Linear(width, config.key_heads * channels, bias=False)
        self.out = nn.Linear(config.heads * channels, width, bias=False)
        self.query_norm = nn.RMSNorm(channels, eps=config.norm_eps) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(channels, eps=config.norm_eps) if config.qk_norm else None
        for name, learnable in (("slopes", config.learns_slopes), ("logit_bias", config.learns_logit_bias)):
            self.register_parameter(name, nn.Parameter(torch.empty(config.heads)) if learnable else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, init_std²), the output's divided by √(2·layers); reset norms, slopes and bias."""
        std = self.config.init_std
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.out.weight, std=std / (2 * self.config.layers) ** 0.5)
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                norm.reset_parameters()
        with torch.no_grad():
            slopes = self.config.head_slopes()
            if self.slopes is not None and slopes is not None:
                _fill(self.slopes, slopes)
            if self.logit_bias is not None:
                bias = self.config.bias_of(self.window)
                _fill(self.logit_bias, torch.zeros(self.config.heads) if bias is None else bias)

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor | None = None,
        cache: RingCache | KeyValueCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        """Attend within x, or with a cache within x and what came before, and append x to the cache.

        Args:
            x: `[B, L, hidden_size]`.
            document_ids: int `[B, L]` or `[L]`: tokens see each other only under equal ids, a negative one is padding.
                Not with a cache.
            cache: of this layer (`SwatTransformer.new_cache`, or any `KeyValueCache`). Keys are kept after rope.
            positions: int `[L]` or `[B, L]` for rope, which tells only differences: they may go on through packed
                documents. None counts from 0, or from the cache's length.
            mask: bool `[B, L]`, False for padding: it sees nothing and is seen by nothing.
            shard: where x is one rank's part of longer sequences; positions are then needed. Not with a cache.

        Returns:
            `[B, L, hidden_size]`.

        Raises:
            ValueError: document_ids with a cache.
        """
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids: expected None with a cache, which holds one document per row, got a tensor")
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, -1, self.config.channels).transpose(1, 2) for f in self._projections())
        if self.query_norm is not None and self.key_norm is not None:
            q, k = _normed(self.query_norm, q), _normed(self.key_norm, k)
        if self.config.rope:
            if positions is None and cache is not None:
                positions = cache.positions(length, mask)
            q, k = (apply_rope(y, positions, base=self.config.rope_base) for y in (q, k))
        out = (
            self._attend(q, k, v, document_ids, mask, shard)
            if cache is None
            else self._attend_cached(q, k, v, cache, mask)
        )
        if self.config.root_norm:
            out = _rooted(out * self.config.unit_sum if self.config.activation == "softmax" else out)
        attended: Tensor = self.out(out.transpose(1, 2).reshape(batch, length, -1))
        return attended

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.query, self.key, self.value

    def _bias(self, q: Tensor) -> tuple[Slopes, Tensor | float | None]:
        """(slopes, logit_bias) in the dtype `flex_swat` wants for q, whatever the parameters were cast to."""
        dtype = per_head_dtype(q)
        slopes = slopes_for(self.config, q) if self.slopes is None else self.slopes.to(dtype)
        if self.logit_bias is None:
            return slopes, bias_for(self.config, self.window, q)
        return slopes, self.logit_bias.to(dtype)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, mask: Tensor | None, shard: Shard | None
    ) -> Tensor:
        if mask is not None:
            shown = document_ids_from_attention_mask(mask)
            document_ids = shown if document_ids is None else torch.where(mask, document_ids, -1)
        slopes, logit_bias = self._bias(q)
        attend = self.attend
        if shard is not None:
            from swat_flex.distributed import context_parallel_swat  # seconds of import that one process does not need

            attend = functools.partial(context_parallel_swat, mesh=shard.mesh, lengths=shard.lengths)
        return attend(
            q, k, v, self.window, slopes=slopes, logit_bias=logit_bias, document_ids=document_ids,
            activation=self.config.activation, backend=self.config.backend,
        )  # fmt: skip

    def _attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, cache: RingCache | KeyValueCache, mask: Tensor | None
    ) -> Tensor:
        """Attend to the cache and the new tokens, and append these.

        A ring is decoded when the tokens are few and unpadded, the activation is the sigmoid and no gradient is wanted;
        otherwise it is prefilled.
        """
        slopes, logit_bias = self._bias(q)
        if not isinstance(cache, RingCache):
            keys, values, ids = cache.update(k, v, mask)
            return flex_swat(
                q, keys, values, self.window, slopes=slopes, logit_bias=logit_bias, document_ids=ids,
                activation=self.config.activation, backend=self.config.backend,
            )  # fmt: skip
        sigmoid = self.config.activation == "sigmoid"
        few = q.shape[2] == 1 or (mask is None and q.shape[2] <= cache.queries)
        if sigmoid and few and not torch.is_grad_enabled():
            cache.append(k, v, mask)
            out = swat_decode(q, cache, slopes=slopes, logit_bias=logit_bias)
            return out if mask is None else torch.where(mask[:, None, :, None], out, 0)
        return swat_prefill(
            q, k, v, cache, mask=mask, slopes=slopes, logit_bias=logit_bias,
            activation=self.config.activation, backend=self.config.backend,
        )  # fmt: skip


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Normalise x in the norm's dtype, float32 under autocast, without which torch has no fused kernel for the two."""
    normed: Tensor = norm(x.to(norm.weight.dtype))
    return normed.to(x.dtype)


def _rooted(x: Tensor) -> Tensor:
    """Divide x by √rms(x) over the last dimension, in float32 or what is wider; 0 stays 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-10) ** -0.25).to(x.dtype)


def _fill(parameter: Tensor, values: Tensor | float) -> None:
    """Write values into a parameter that may be sharded over ranks."""
    if isinstance(values, Tensor) and hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor  # a second of import

        assert isinstance(parameter, DTensor)
        values = distribute_tensor(
            values.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(torch.as_tensor(values))
