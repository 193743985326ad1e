"""`SwatTransformer`: a decoder of SWAT layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swat_flex.decode import RingCache
from swat_flex.nn import sampling
from swat_flex.nn.attention import KeyValueCache, SwatAttention
from swat_flex.nn.config import SwatConfig
from swat_flex.nn.loss import IGNORED, head_cross_entropy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from swat_flex.distributed import Shard


class SwiGLU(nn.Module):
    """down(silu(gate x) · up x); source: arXiv 2002.05202."""

    def __init__(self, config: SwatConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, init_std²), the output's divided by √(2·layers)."""
        std = self.config.init_std
        nn.init.normal_(self.gate.weight, std=std)
        nn.init.normal_(self.up.weight, std=std)
        nn.init.normal_(self.down.weight, std=std / (2 * self.config.layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., hidden_size]` to the same."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class SwatBlock(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, config: SwatConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = SwatAttention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        document_ids: Tensor | None = None,
        cache: RingCache | KeyValueCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        shard: Shard | None = None,
    ) -> Tensor:
        """`[B, L, hidden_size]` to the same; arguments as `SwatAttention.forward`."""
        x = x + self.attention(self.attention_norm(x), document_ids, cache, positions, mask, shard)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class SwatTransformer(nn.Module):
    """A language model of SWAT layers: pre-norm RMSNorm, SwiGLU, no biases, tied or untied head.

    Initialisation: every matrix and the embedding N(0, init_std²), the two that write into the residual stream divided
    by √(2·layers), so that its variance does not grow with depth; norms 1; slopes and bias as the configuration says.

    `reset_parameters` draws it all again, after `to_empty` of a model made under `torch.device("meta")` too.

    >>> model = SwatTransformer(SwatConfig(vocab_size=100, hidden_size=32, layers=2, heads=4, window=8))
    >>> model(torch.randint(100, (1, 20))).shape
    torch.Size([1, 20, 100])

    Attributes:
        config: as given.
        gradient_checkpointing: keep each block's input alone and run the block again in the backward pass; False at
            first.
        context: a one-dimensional DeviceMesh whose ranks hold contiguous shards of each row, in its order; None at
            first. Parameters stay as they are: FSDP or DDP over the same ranks averages their gradients.
    """

    context: DeviceMesh | None

    def __init__(self, config: SwatConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.context = None
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(SwatBlock(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie()
        self._reset_ends()

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _reset_ends(self) -> None:
        nn.init.normal_(self.embedding.weight, std=self.config.init_std)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=self.config.init_std)
        self.norm.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again, in one order, from torch's global generator."""
        self._tie()  # to_empty gives the two names memory of their own
        for module in self.modules():
            if module is not self and isinstance(module, (SwatAttention, SwiGLU, nn.RMSNorm)):
                module.reset_parameters()
        self._reset_ends()

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: Sequence[RingCache | KeyValueCache] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """Logits, or with targets the loss: one entry for both, so that compiled and sharded models train through it.

        Args:
            tokens: int `[B, L]`.
            document_ids: int `[B, L]` or `[L]`, packed documents; a negative id is padding. Not with a cache.
            cache: from `new_cache`, or any `KeyValueCache` per layer; the tokens go on from it and are appended to it.
            positions: int `[L]` or `[B, L]` for rope; None counts from 0 or goes on from the cache.
            mask: bool `[B, L]`, False for padding, at any place.
            targets: int64 `[B, L]`, the token that follows each; −100 does not count.
            logits_to_keep: of the last tokens alone; None is all.

        With `context` set and no cache, L counts this rank's tokens, document_ids are the whole row's part, and
        positions None counts from the row's first token. The loss is this rank's share: the mean of it over the
        context's ranks is the mean over all tokens. With a cache each rank is on its own.

        Returns:
            `[B, L, vocab_size]` in the head's dtype, or the mean cross-entropy in nats (`chunked_cross_entropy`).

        Raises:
            ValueError: an argument that breaks a rule above.
        """
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens: expected int [B, L], got {tokens.dtype} of shape {list(tokens.shape)}")
        x = self.features(self.embedding(tokens), document_ids, cache, positions, mask)
        if targets is not None:
            if self.context is None or cache is not None:
                return head_cross_entropy(x, self.head, targets, self.config.vocab_size)
            counted = (targets != IGNORED).sum()
            torch.distributed.all_reduce(counted, group=self.context.get_group())
            part = head_cross_entropy(x, self.head, targets, self.config.vocab_size, reduction="sum")
            return part / counted * self.context.size()
        if logits_to_keep is not None:
            x = x[:, x.shape[1] - logits_to_keep :]
        logits: Tensor = self.head(x)
        return logits

    def features(
        self,
        x: Tensor,
        document_ids: Tensor | None = None,
        cache: Sequence[RingCache | KeyValueCache] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, `[B, L, hidden_size]`, from the embedded tokens x `[B, L, hidden_size]`.

        Other arguments as `forward`.
        """
        if cache is not None and len(cache) != len(self.blocks):
            raise ValueError(f"cache: expected one RingCache per layer, {len(self.blocks)} of them, got {len(cache)}")
        shard = None if self.context is None or cache is not None else self._shard(x, document_ids, mask)
        if shard is not None and positions is None:
            positions = torch.arange(shard.first, shard.first + x.shape[1], device=x.device)
        for layer, block in enumerate(self.blocks):
            of_layer = None if cache is None else cache[layer]
            if self.gradient_checkpointing and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, document_ids, None, positions, mask, shard, use_reentrant=False)
            else:
                x = block(x, document_ids, of_layer, positions, mask, shard)
        normed: Tensor = self.norm(x)
        return normed

    def _shard(self, x: Tensor, document_ids: Tensor | None, mask: Tensor | None) -> Shard:
        """Ask the ranks of `context` which tokens of the rows they hold: one small all-gather for all layers."""
        from swat_flex.distributed import Shard, shard_lengths  # seconds of import that one process does not need

        assert self.context is not None
        lengths = shard_lengths(
            x.shape[1],
            self.context,
            x.device,
            batch=x.shape[0],
            document_ids_dimensions=0 if document_ids is None else document_ids.dim(),
            document_ids_itemsize=0 if document_ids is None else document_ids.dtype.itemsize,
            mask=int(mask is not None),
        )
        return Shard(self.context, lengths)

    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats; arguments as `forward`. The `[L, vocab_size]` logits never exist all at once."""
        loss: Tensor = self(tokens, document_ids, targets=targets)
        return loss

    def new_cache(
        self,
        batch: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        queries: int = 1,
        capacity: int | None = None,
    ) -> list[RingCache]:
        """An empty cache for `forward`, one RingCache per layer, in constant memory.

        Args:
            batch: rows.
            dtype: of keys and values, what the projections give; None is the parameters'.
            device: None is the parameters'.
            queries: most new tokens that are decoded at once, 1 to 16; more are prefilled.
            capacity: keys that a layer with window None keeps, which past them forgets the oldest.

        Raises:
            ValueError: a layer with window None and no capacity.
        """
        if None in self.config.windows and capacity is None:
            raise ValueError("capacity: expected a number of tokens where a layer's window is None, got None")
        weight = self.embedding.weight
        device = weight.device if device is None else device
        return [
            RingCache(
                batch, self.config.key_heads, window or capacity or 0, self.config.channels,
                dtype=weight.dtype if dtype is None else dtype, device=device, queries=queries,
            )
            for window in self.config.windows
        ]  # fmt: skip

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        mask: Tensor | None = None,
        stop: int | None = None,
        generator: torch.Generator | None = None,
        stream: Callable[[Tensor], None] | None = None,
        prefill: int = 4096,
    ) -> Tensor:
        """Continue each row, token by token, in constant memory. Arguments as `sampling.generate`."""
        return sampling.generate(
            self, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, mask=mask, stop=stop,
            generator=generator, stream=stream, prefill=prefill,
        )  # fmt: skip
