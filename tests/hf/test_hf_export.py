"""torch.export: one program for every batch and length, with each cache made inside it."""

import pytest
import torch
from hf_models import left_padded, other_model, swat_model, tokens
from transformers import DynamicCache, StaticCache

from swat_flex.hf import SwatCache

BATCH, LENGTH = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=8, max=60)
CACHES = {
    "ring": SwatCache,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=64),
}


def named(name):
    return swat_model(num_hidden_layers=1) if name == "swat" else other_model(name, num_hidden_layers=1)


class Step(torch.nn.Module):
    """A prompt, then one more token, from a cache made for them."""

    def __init__(self, model, kind):
        super().__init__()
        self.model, self.make = model, CACHES[kind]

    def forward(self, x):
        cache = self.make(self.model.config)
        prompt = self.model(x[:, :-1], cache=cache, use_cache=True).logits
        return torch.cat((prompt, self.model(x[:, -1:], cache=cache, use_cache=True).logits), 1)


@pytest.mark.parametrize("name", ["swat", "Mistral", "Llama"])
def test_padded_batches_of_any_size(name):
    model, given = named(name), {"attention_mask": left_padded(), "use_cache": False}
    shapes = {name: {0: BATCH, 1: LENGTH} for name in ("input_ids", "attention_mask")} | {"use_cache": None}
    program = torch.export.export(model, (tokens(),), given, dynamic_shapes=shapes).module()
    for batch, length in ((3, 20), (1, 8)):
        x, given = tokens(batch, length), {"attention_mask": left_padded(batch, length), "use_cache": False}
        torch.testing.assert_close(program(x, **given).logits, model(x, **given).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", ["swat", "Mistral"])
def test_a_cache_of_any_batch_and_prompt(name, kind):
    step = Step(named(name), kind)
    with torch.no_grad():
        program = torch.export.export(step, (tokens(),), dynamic_shapes={"x": {0: BATCH, 1: LENGTH}}).module()
        for batch, length in ((3, 20), (1, 9)):
            x = tokens(batch, length)
            torch.testing.assert_close(program(x), step(x), rtol=0, atol=1e-12)
