"""`SwatConfig`: everything that makes a model, in numbers and words."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from swat_flex.positions import Schedule, alibi_slopes, per_head_dtype, unit_logit_bias
from swat_flex.tracing import can_cache, is_traced

Slopes = Literal["balanced", "alibi"] | Tensor | None  # what flex_swat takes
PAPER: dict[str, Any] = {
    "slopes": "balanced", "learnable_slopes": False, "qk_norm": False, "logit_bias": None,
    "learnable_logit_bias": False, "root_norm": False,
}  # fmt: skip
"""Fields of a `SwatConfig` with which it is the paper's Eq. 5 and `flex_swat`'s default, not the recipe."""
SPLIT = "'balanced', 'alibi', None or 'negative:positive' heads such as '8:4'"


@dataclass(frozen=True, slots=True)
class SwatConfig:
    """A SWAT model, or one of its baselines. Every row of the paper's Tables 2 and 3 is one configuration.

    The defaults are the recipe of docs/training.md: ALiBi's slopes and the unit bias, both learnt, beside rope,
    qk_norm and root_norm. `PAPER` holds what the paper has instead.

    >>> SwatConfig(heads=12, slopes="6:6").head_slopes()[5:7]
    tensor([-0.0156,  0.5000])

    Attributes:
        vocab_size: tokens of the vocabulary.
        hidden_size: channels of the residual stream.
        layers: blocks of attention and SwiGLU.
        heads: query heads.
        kv_heads: key heads, a divisor of heads; None is heads.
        head_dim: channels of a head, 1 to 256, even with rope; None is hidden_size / heads.
        intermediate_size: channels within SwiGLU; None is 8/3 · hidden_size rounded up to a multiple of 64.
        window: keys per query, its own included; None is all of them (plain causal); a tuple has one per layer.
        activation: "sigmoid", or "softmax" over the visible keys.
        slopes: linear bias in logits per token of distance, negative favours recent keys. "balanced" and "alibi" as in
            `flex_swat`; "n:m" is the paper's wording, n negative heads and then m positive ones; None is no bias.
        slope_schedule: magnitudes for "n:m", "2^-k" (the paper's Eq. 4) or "2^-8k/h" (ALiBi's), each sign on its own.
        learnable_slopes: the slopes above, where there are any, are where training starts.
        rope: rotary embedding on queries and keys.
        rope_base: its wavelength base.
        qk_norm: RMSNorm over each head's channels of queries and keys, before rope.
        root_norm: divide each head's output by the root of its rms, o/√rms(o): halfway to an RMSNorm, which forgets the
            size.
        logit_bias: added to every logit: None, a number, or where σ's weights shall sum to 1 over a full window at the
            start, as a softmax's do: "unit", for each head by its slope (`unit_logit_bias`), or "-log(window)", for
            slopes of 0. With root_norm "unit" aims at 1/16, so that one weight can grow to 16 times the sum at the
            start. A softmax has no use for "unit" and then has no bias; with root_norm its output is divided by 16.
        learnable_logit_bias: the bias above (None: 0) is where training starts, one per head.
        assumed_length: keys per query that "unit" reckons with in layers whose window is None, and needs there.
        tie_embeddings: the output head is the embedding.
        norm_eps: of every RMSNorm.
        init_std: standard deviation of the initial weights.
        backend: of `flex_swat`.

    Raises:
        TypeError, ValueError: a value that breaks a rule above.
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    window: int | tuple[int | None, ...] | None = 512
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    slopes: str | None = "alibi"
    slope_schedule: Schedule = "2^-k"
    learnable_slopes: bool = True
    rope: bool = True
    rope_base: float = 10000.0
    qk_norm: bool = True
    root_norm: bool = True
    logit_bias: float | Literal["unit", "-log(window)"] | None = "unit"
    learnable_logit_bias: bool = True
    assumed_length: int | None = None
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    init_std: float = 0.02
    backend: Literal["auto", "flex", "triton", "cpp", "banded", "naive"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.window, list):  # what JSON makes of a tuple
            object.__setattr__(self, "window", tuple(self.window))
        _check_sizes(self)
        _check_windows(self)
        _check_choices(self)

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.heads if self.head_dim is None else self.head_dim

    @property
    def mlp_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-8 * self.hidden_size // (3 * 64)) * 64

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Keys per query of each layer."""
        return self.window if isinstance(self.window, tuple) else (self.window,) * self.layers

    def head_slopes(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """`[heads]`, logits per token of distance, or None."""
        if self.slopes is None:
            return None
        positive, schedule = 0, self.slope_schedule
        if self.slopes == "balanced":
            positive, schedule = self.heads // 2, "2^-k"
        elif self.slopes == "alibi":
            schedule = "2^-8k/h"
        else:
            positive = int(self.slopes.split(":")[1])
        return alibi_slopes(self.heads, positive=positive, schedule=schedule, device=device, dtype=dtype)

    @property
    def learns_slopes(self) -> bool:
        """Tell whether slopes are parameters."""
        return self.learnable_slopes and self.slopes is not None

    @property
    def learns_logit_bias(self) -> bool:
        """Tell whether the logit bias is a parameter."""
        return self.learnable_logit_bias and not (self.logit_bias == "unit" and self.activation == "softmax")

    @property
    def unit_sum(self) -> float:
        """Sum of a full row's weights at the start, where the logit bias is "unit" and the scores are 0."""
        return 1 / 16 if self.root_norm else 1.0

    def bias_of(
        self, window: int | None, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor | float | None:
        """The logit bias of a layer with this window at the start of training: `[heads]` for "unit", else a number."""
        if self.logit_bias == "-log(window)":
            return None if window is None else -math.log(window)
        if self.logit_bias != "unit":
            return self.logit_bias
        keys = self.assumed_length if window is None else window
        if self.activation == "softmax" or keys is None:
            return None
        slopes = self.head_slopes(device, dtype)
        slopes = torch.zeros(self.heads, device=device, dtype=dtype) if slopes is None else slopes
        return unit_logit_bias(slopes, keys, self.unit_sum)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain values, as JSON has them; `from_dict` turns them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SwatConfig:
        """Make a configuration from what `to_dict` gave, now or before root_norm; an unknown name raises ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"values: expected fields of SwatConfig ({', '.join(sorted(known))}), got {name!r}")
        return cls(**{"root_norm": False, **values})


def slopes_for(config: SwatConfig, q: Tensor) -> Slopes:
    """`flex_swat`'s argument slopes for the fixed slopes of a configuration, made once per device and dtype.

    Args:
        config: the model's.
        q: `[B, heads, L, D]`, whose device and dtype they are for.
    """
    if config.slopes in (None, "balanced", "alibi"):
        return config.slopes  # type: ignore[return-value] # flex_swat knows these names, and keeps their slopes
    dtype = per_head_dtype(q)
    if is_traced(q):
        return config.head_slopes(q.device, dtype)
    key = (config.slopes, config.slope_schedule, q.device, dtype)  # "n:m" tells the heads
    made = _made.get(key)
    if made is None:
        made = config.head_slopes(q.device, dtype)
        assert made is not None
        if can_cache(made) and len(_made) < 256:
            _made[key] = made
    return made


def bias_for(config: SwatConfig, window: int | None, q: Tensor) -> Tensor | float | None:
    """`flex_swat`'s argument logit_bias for the fixed bias of a configuration, made once per device and dtype.

    Args:
        config: the model's.
        window: of the layer.
        q: `[B, heads, L, D]`, whose device and dtype it is for.
    """
    dtype = per_head_dtype(q)
    if config.logit_bias != "unit" or is_traced(q):
        return config.bias_of(window, q.device, dtype)
    keys = window or config.assumed_length
    key = ("unit", config.slopes, config.slope_schedule, config.heads, keys, config.root_norm, q.device, dtype)
    made = _made.get(key)
    if made is None:
        bias = config.bias_of(window, q.device, dtype)
        if not isinstance(bias, Tensor):
            return bias
        made = bias
        if can_cache(made) and len(_made) < 256:
            _made[key] = made
    return made


_made: dict[tuple[object, ...], Tensor] = {}


def _check_sizes(config: SwatConfig) -> None:
    for name in ("vocab_size", "hidden_size", "layers", "heads"):
        _whole(name, getattr(config, name))
    for name in ("kv_heads", "head_dim", "intermediate_size"):
        if getattr(config, name) is not None:
            _whole(name, getattr(config, name))
    if config.heads % config.key_heads:
        raise ValueError(f"kv_heads: expected a divisor of heads = {config.heads}, got {config.kv_heads}")
    if config.head_dim is None and config.hidden_size % config.heads:
        raise ValueError(
            f"hidden_size: expected a multiple of heads = {config.heads} where head_dim is None, "
            f"got {config.hidden_size}"
        )
    if config.channels > 256:
        raise ValueError(f"head_dim: expected at most 256 channels, got {config.channels}")
    if config.rope and config.channels % 2:
        raise ValueError(f"head_dim: expected an even number of channels with rope, got {config.channels}")
    for name in ("rope_base", "norm_eps", "init_std"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def _check_windows(config: SwatConfig) -> None:
    if isinstance(config.window, tuple) and len(config.window) != config.layers:
        raise ValueError(f"window: expected one per layer, {config.layers} of them, got {len(config.window)}")
    for window in config.windows:
        if window is not None:
            _whole("window", window)


def _check_choices(config: SwatConfig) -> None:
    for name in ("learnable_slopes", "rope", "qk_norm", "root_norm", "learnable_logit_bias", "tie_embeddings"):
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name}: expected a bool, got {type(getattr(config, name)).__name__}")
    _one_of("activation", config.activation, ("sigmoid", "softmax"))
    _one_of("slope_schedule", config.slope_schedule, ("2^-k", "2^-8k/h"))
    _one_of("backend", config.backend, ("auto", "flex", "triton", "cpp", "banded", "naive"))
    _check_slopes(config)
    _check_bias(config)


def _check_bias(config: SwatConfig) -> None:
    bias = config.logit_bias
    if config.assumed_length is not None:
        _whole("assumed_length", config.assumed_length, least=2)
    if isinstance(bias, str):
        _one_of("logit_bias", bias, ("unit", "-log(window)"))
        if bias == "-log(window)" and None in config.windows:
            raise ValueError(f"logit_bias: expected a number or None where a window is None, got {bias!r}")
        if bias == "unit" and config.activation == "sigmoid":
            if None in config.windows and config.assumed_length is None:
                raise ValueError(
                    "assumed_length: expected keys per query for the unit bias where a window is None, got None"
                )
            if 1 in config.windows:
                raise ValueError("logit_bias: expected a number or None where a window is 1, got 'unit'")
    elif bias is not None and (isinstance(bias, bool) or not isinstance(bias, (int, float))):
        raise TypeError(f"logit_bias: expected a float, 'unit', '-log(window)' or None, got {type(bias).__name__}")
    elif bias is not None and not math.isfinite(bias):
        raise ValueError(f"logit_bias: expected a finite number, got {bias}")


def _check_slopes(config: SwatConfig) -> None:
    slopes = config.slopes
    if slopes is None:
        return
    if not isinstance(slopes, str):
        raise TypeError(f"slopes: expected {SPLIT}, got {type(slopes).__name__}")
    if slopes in ("balanced", "alibi"):
        return
    parts = slopes.split(":")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"slopes: expected {SPLIT}, got {slopes!r}")
    if sum(map(int, parts)) != config.heads:
        raise ValueError(f"slopes: expected negative:positive to sum to heads = {config.heads}, got {slopes!r}")


def _whole(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
