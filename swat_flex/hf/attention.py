"""`attn_implementation="swat_flex"`: sliding-window sigmoid attention inside transformers' own models."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from swat_flex.api import flex_swat
from swat_flex.hf.config import refuse_attentions
from swat_flex.hf.mask import aligned
from swat_flex.hf.square import is_square, square_documents
from swat_flex.nn import PAPER, SwatConfig
from swat_flex.nn.config import bias_for, slopes_for
from swat_flex.positions import document_ids_from_cu_seqlens, per_head_dtype

OPTIONS = ("slopes", "slope_schedule", "logit_bias", "assumed_length", "activation", "backend")
REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")


def swat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`flex_swat` as an attention function of transformers: for models trained from scratch with it.

    A query sees the sliding_window keys up to its own; without one, all before it. Padding and packing come by
    `swat_mask`, packing by cu_seq_lens_q too. `config.swat_flex` chooses the rest: True, or a dict with any of
    `SwatConfig`'s slopes, slope_schedule, logit_bias, assumed_length, activation and backend; what it leaves out is the
    paper's.

    Args:
        module: the model's attention layer; its config is read.
        query: `[B, Hq, T, D]`, after rope; under tensor parallelism this rank's heads.
        key, value: `[B, Hkv, L, D]`, as a cache returns them.
        attention_mask: from `swat_mask`; or a user's own of four dimensions (`square_documents`), which then tells the
            window too.
        scaling: factor on ⟨q, k⟩; None is D^(−1/2).
        dropout: 0, as attention without a normaliser has none.
        sliding_window: keys per query, its own included.

    Returns:
        `[B, T, Hq, D]`, and None for the weights, which never exist.

    Raises:
        ValueError, NotImplementedError: what `flex_swat` cannot express; never another result instead.

    Warns:
        UserWarning, once per model: its weights came from `from_pretrained` and config.swat_flex is not set, so they
        were trained with a softmax. A first run of weights that were not loaded sets config.swat_flex.
    """
    _check(module, attention_mask, dropout, kwargs)
    config = module.config
    if not torch.compiler.is_compiling():
        _warn_of_softmax(module, config)
    window = getattr(module, "sliding_window", None) if sliding_window is None else sliding_window
    queries = query.shape[2]
    ids: Tensor | None
    if attention_mask is not None and is_square(attention_mask):  # it says all, as in transformers' own attention
        ids, seen = square_documents(attention_mask, query.shape[0], queries, key.shape[2])
    else:
        key, value, ids = aligned(key, value, attention_mask, window, queries)
        seen = window
    ids = _with_lengths(ids, kwargs.get("cu_seq_lens_q"), query, key)
    heads = query.shape[1]
    total = getattr(config, "num_attention_heads", heads)
    options = options_of(config, total)
    slopes, logit_bias = slopes_for(options, query), _bias(options, window, query)
    if heads != total:
        share = _share_of_heads(module, heads, total)
        slopes = options.head_slopes(query.device, per_head_dtype(query))
        slopes = None if slopes is None else slopes[share]
        logit_bias = logit_bias[share] if isinstance(logit_bias, Tensor) else logit_bias
    out = flex_swat(
        query, key, value, seen, scale=scaling, document_ids=ids, activation=options.activation, slopes=slopes,
        logit_bias=logit_bias, backend=options.backend,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def options_of(config: Any, heads: int) -> SwatConfig:
    """`config.swat_flex` as the one-layer SwatConfig that it describes.

    Raises:
        ValueError: a name that is not among OPTIONS, or a value that breaks a rule of `SwatConfig`'s.
    """
    chosen = getattr(config, "swat_flex", None)
    chosen = chosen if isinstance(chosen, dict) else {}
    for name in chosen:
        if name not in OPTIONS:
            raise ValueError(f"config.swat_flex: expected any of {', '.join(OPTIONS)}, got {name!r}")
    if torch.compiler.is_compiling():
        return _one_layer(heads, chosen)
    key = (heads, repr(chosen))
    if key not in _described:
        _described[key] = _one_layer(heads, chosen)
    return _described[key]


_described: dict[tuple[int, str], SwatConfig] = {}  # made once per model, not per layer and token


def _one_layer(heads: int, chosen: dict[str, Any]) -> SwatConfig:
    one = {"hidden_size": heads, "heads": heads, "layers": 1, "head_dim": 1, "rope": False}
    return SwatConfig(**{**one, **PAPER, **chosen})


def _share_of_heads(module: nn.Module, heads: int, total: int) -> slice:
    """Find which of the model's query heads this rank holds, by how its projections are sharded."""
    from torch.distributed.tensor import DTensor, Shard  # a second of import that one process does not need

    for weight in module.parameters():
        if isinstance(weight, DTensor) and weight.placements == (Shard(0),):
            mesh = weight.device_mesh
            if mesh.size() * heads == total:
                return slice(mesh.get_local_rank() * heads, (mesh.get_local_rank() + 1) * heads)
    raise NotImplementedError(
        f"query: expected config.num_attention_heads = {total} heads, or an even share of them on each rank of a "
        f"tensor parallel mesh, got {heads}"
    )


def _bias(options: SwatConfig, window: int | None, query: Tensor) -> Tensor | float | None:
    known = options.logit_bias == "unit" and options.assumed_length is not None
    if isinstance(options.logit_bias, str) and window is None and not known:
        raise ValueError(
            f"config.swat_flex: expected a logit_bias in numbers, or 'unit' and an assumed_length, without a window, "
            f"got {options.logit_bias!r}"
        )
    return bias_for(options, window, query)


def _check(module: nn.Module, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    if mask is not None and mask.dim() != 4:
        raise ValueError(
            "attention_mask: expected None, or what `swat_mask` makes of [B, L], or four dimensions with "
            f"attn_implementation='swat_flex', got shape {list(mask.shape)}"
        )
    if dropout:
        raise ValueError(f"attention_dropout: expected 0 with attn_implementation='swat_flex', got {dropout}")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise NotImplementedError("is_causal: expected True with attn_implementation='swat_flex', got False")
    refuse_attentions(module.config, kwargs)
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: expected None with attn_implementation='swat_flex', got a value")


def _with_lengths(ids: Tensor | None, lengths: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Tell the documents of cumulative lengths (transformers' `cu_seq_lens_q`) apart in the ids."""
    if lengths is None or query.shape[2] != key.shape[2]:
        return ids
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: expected a batch of one packed row, got {query.shape[0]} rows")
    packed = document_ids_from_cu_seqlens(lengths, key.shape[2])
    return packed if ids is None else torch.where(ids < 0, -1, packed)


def _warn_of_softmax(module: nn.Module, config: Any) -> None:
    """Say once per model that loaded weights do not become a sigmoid's; mark a config whose weights are new."""
    if getattr(config, "swat_flex", None) or getattr(module, "layer_idx", 0):
        return
    if not getattr(config, "name_or_path", ""):
        config.swat_flex = True
    elif not getattr(module, "_swat_flex_warned", False):
        module._swat_flex_warned = True  # type: ignore[assignment] # a plain attribute
        warnings.warn(
            f"{config.name_or_path!r} was loaded with attn_implementation='swat_flex', and its config does not say "
            "that it was trained so. A checkpoint trained with softmax attention does not become a sigmoid one by "
            "switching the function: expect noise until it is trained again. Set config.swat_flex = True for weights "
            "trained with it, or to silence this.",
            stacklevel=3,
        )
