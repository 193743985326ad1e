"""`SwatModelConfig`: a SwatConfig in transformers' words, strict and saved as config.json."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from swat_flex.nn import SwatConfig

FIELDS = tuple(field.name for field in fields(SwatConfig))  # read here: a trace cannot
# SwatConfig's name of each field → transformers'. Fields of one name are left out.
NAMES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "window": "windows",
    "rope_base": "rope_parameters",
    "tie_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}


@strict
class SwatModelConfig(PreTrainedConfig):
    """A SWAT model for transformers; each field means what `SwatConfig`'s does.

    >>> SwatModelConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, windows=[16, None],
    ...     assumed_length=1024).layer_types
    ['sliding_attention', 'full_attention']

    Attributes:
        sliding_window: keys per query, its own included; None is all of them. Where the layers differ, the widest.
        windows: one per layer, where they differ; None is sliding_window in each.
        skip_logits: in training with labels make no logits, which of all tokens would need memory; False for a training
            loop that reads them.
        rope: rotary embedding or none, with rope_parameters {"rope_type": "default", "rope_theta": base}.

    Raises:
        TypeError, ValueError: a value that breaks a rule of `SwatConfig`'s, or another rope_type.
    """

    model_type = "swat_flex"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 # transformers adds lists to it

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    sliding_window: int | None = 512
    windows: list[int | None] | tuple[int | None, ...] | None = None
    layer_types: list[str] | None = None
    activation: str = "sigmoid"
    slopes: str | None = "alibi"
    slope_schedule: str = "2^-k"
    learnable_slopes: bool = True
    rope: bool = True
    rope_parameters: dict[str, Any] | None = None
    qk_norm: bool = True
    root_norm: bool = True
    logit_bias: float | int | str | None = "unit"
    learnable_logit_bias: bool = True
    assumed_length: int | None = None
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    backend: str = "auto"
    skip_logits: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.windows is not None:
            self.windows = list(self.windows)
            self.sliding_window = max((window for window in self.windows if window is not None), default=None)
        # Filled as transformers' own configurations fill them: what serves models reads them.
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        types = ["full_attention" if window is None else "sliding_attention" for window in self.layer_windows]
        if self.layer_types not in (None, types):
            raise ValueError(f"layer_types: expected None or what the windows say, {types}, got {self.layer_types}")
        self.layer_types = types
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind != "default":
            raise ValueError(f"rope_parameters: expected rope_type 'default', got {kind!r}")
        super().__post_init__(**kwargs)
        self.intermediate_size = self.to_swat().mlp_size

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from what a folder holds; one written before root_norm has none."""
        return super().from_dict({"root_norm": False, **config_dict}, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: no code is copied when a model is saved, its folder names this library."""

    @property
    def layer_windows(self) -> list[int | None]:
        """Keys per query of each layer."""
        return [self.sliding_window] * self.num_hidden_layers if self.windows is None else list(self.windows)

    def to_swat(self) -> SwatConfig:
        """The same model as a SwatConfig."""
        values = {name: getattr(self, NAMES.get(name, name)) for name in FIELDS}
        assert self.rope_parameters is not None  # filled by PreTrainedConfig
        values["rope_base"] = self.rope_parameters["rope_theta"]
        values["window"] = self.sliding_window if self.windows is None else tuple(self.windows)
        try:
            return SwatConfig(**values)
        except (TypeError, ValueError) as error:
            name, rule = str(error).split(":", 1)
            raise type(error)(f"{NAMES.get(name, name)}:{rule}") from error

    @classmethod
    def from_swat(cls, config: SwatConfig, **kwargs: Any) -> SwatModelConfig:
        """Make the configuration of the same model; kwargs are what a SwatConfig lacks, such as eos_token_id."""
        values = {NAMES.get(name, name): value for name, value in config.to_dict().items()}
        windows = values.pop("windows")
        values["windows" if isinstance(windows, tuple) else "sliding_window"] = windows
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values["rope_parameters"]}
        return cls(**values, **kwargs)


def refuse_attentions(config: Any, options: dict[str, Any]) -> None:
    """Refuse a wish for attention weights, which never exist.

    Raises:
        NotImplementedError: output_attentions is set, in a call's options or in the config.
    """
    if options.get("output_attentions") or getattr(config, "output_attentions", False):
        raise NotImplementedError("output_attentions: expected False, as attention weights never exist, got True")
