"""Tiny models: weights large enough that logits, and so generated tokens, differ."""

import torch

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PLAIN = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3}


def swat_model(seed=0, dtype=torch.float64, **options):
    """A `SwatForCausalLM` in evaluation mode."""
    from swat_flex.hf import SwatForCausalLM, SwatModelConfig

    torch.manual_seed(seed)
    return SwatForCausalLM(SwatModelConfig(**{**SIZES, **PLAIN, "sliding_window": 5, **options})).to(dtype).eval()


def other_model(name, seed=0, dtype=torch.float64, **options):
    """A model of transformers' own, attn_implementation="swat_flex", in evaluation mode."""
    import transformers

    given = {**SIZES, **PLAIN, "intermediate_size": 48, "attn_implementation": "swat_flex", **options}
    if name.startswith("Qwen"):
        given = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1, **given}
    if name.startswith("Mistral"):
        given = {"sliding_window": 5, **given}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**given)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()


def tokens(batch=2, length=13, seed=1):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch=2, length=13, padding=4):
    """`[batch, length]`, the first row padded on the left."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :padding] = 0
    return mask
