"""Generation: one answer whatever keeps the keys."""

from functools import partial

import pytest
import torch
from hf_models import left_padded, other_model, swat_model, tokens
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache, StaticCache

from swat_flex.hf import RingLayer, SwatCache

WAYS = {
    "default": lambda config: {},
    "ring": lambda config: {"cache": SwatCache(config)},
    "static": lambda config: {"cache_implementation": "static"},
    "dynamic": lambda config: {"cache_implementation": "dynamic"},
    "dynamic without windows": lambda config: {"cache": DynamicCache()},
    "chunks": lambda config: {"prefill_chunk_size": 4},
    "no cache": lambda config: {"use_cache": False},
}
MODELS = {
    "swat": swat_model,
    "swat of two windows": lambda: swat_model(windows=[3, None], assumed_length=9),
    "swat of window 1": lambda: swat_model(sliding_window=1, logit_bias=-1.0),
    "swat with softmax": lambda: swat_model(activation="softmax"),
    "Mistral": lambda: other_model("Mistral"),
    "Mistral of window 1": lambda: other_model("Mistral", sliding_window=1),
    "Qwen3": lambda: other_model("Qwen3", head_dim=8),
    "Llama": lambda: other_model("Llama"),
}
SEARCHES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", MODELS)
def test_every_cache_gives_the_same_tokens_and_logits(name, search):
    """Prompts padded on the left, longer and shorter than the window; generated past several windows."""
    model, outs = MODELS[name](), {}
    for way, options in WAYS.items():
        torch.manual_seed(5)
        outs[way] = model.generate(
            tokens(), attention_mask=left_padded(padding=10), max_new_tokens=12, return_dict_in_generate=True,
            output_logits=True, **SEARCHES[search], **options(model.config),
        )  # fmt: skip
    first = outs["default"]
    assert len(set(first.sequences[:, 13:].flatten().tolist())) > 6
    for way, out in outs.items():
        assert torch.equal(out.sequences, first.sequences), way
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(first.logits), rtol=0, atol=1e-9, msg=way)
    kept = outs["default"].cache
    assert isinstance(kept, SwatCache) == name.startswith("swat")


@pytest.mark.parametrize("name", ["swat", "Mistral"])
def test_padding_makes_no_difference(name):
    model, x = MODELS[name](), tokens(1, 9)
    alone = model.generate(x, max_new_tokens=8, do_sample=False)[0, 9:]
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.int64), x), 1)
    mask = (torch.arange(13) >= 4).long()[None]
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[0, 13:], alone)


@pytest.mark.parametrize("name", ["swat", "Mistral"])
def test_a_conversation_goes_on_from_its_cache(name):
    model, x = MODELS[name](), tokens(1, 9)
    cache = SwatCache(model.config)
    said = model.generate(x, cache=cache, max_new_tokens=5, do_sample=False)
    more = torch.cat((said, tokens(1, 7, seed=2)), 1)
    again = model.generate(more, cache=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(again, model.generate(more, use_cache=False, max_new_tokens=5, do_sample=False))


def test_tokens_guessed_ahead_are_taken_back():
    """Assisted generation crops its cache, so it does not get a ring."""
    model, x = swat_model(), tokens(1, 9).repeat(1, 3)
    plain = model.generate(x, max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(x, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=4), plain)
    cache = SwatCache(model.config)
    model(x, cache=cache)
    cache.crop(0)
    with pytest.raises(NotImplementedError, match="tokens_to_remove: expected 0 with a ring"):
        cache.crop(-2)


def test_memory_does_not_grow_and_rows_can_be_chosen():
    model, x = swat_model(), tokens(3, 40)
    cache = SwatCache(model.config)
    with torch.no_grad():
        model(x[:, :5], cache=cache)
        size, place = cache.nbytes, [layer.ring.keys.data_ptr() for layer in cache.layers]
        model(x[:, 5:30], cache=cache)
        assert (cache.nbytes, [layer.ring.keys.data_ptr() for layer in cache.layers]) == (size, place)
        assert cache.get_seq_length() == 30
        assert cache.layers[0].ring.slots == 5
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([2, 2, 0, 0])
        got = model(x[rows, 30:], cache=cache).logits
        torch.testing.assert_close(got, model(x[rows], use_cache=False).logits[:, 30:], rtol=0, atol=1e-10)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(x[:, :7].repeat(2, 1)[:4], cache=cache).logits
        torch.testing.assert_close(again[:3], model(x[:, :7]).logits, rtol=0, atol=1e-10)


def test_a_cache_of_another_model_is_refused():
    model = swat_model()
    with pytest.raises(ValueError, match="cache: expected window 5 in layer 0, got 4"):
        model(tokens(), cache=SwatCache(swat_model(sliding_window=4).config))
    config = other_model("Mistral").config
    config.layer_types = ["chunked_attention"] * 2
    with pytest.raises(NotImplementedError, match="config: expected sliding or full attention"):
        SwatCache(config)
    assert [
        type(layer) is RingLayer for layer in SwatCache(swat_model(windows=[3, None], assumed_length=9).config).layers
    ] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("name", "kind", "padded"),
    [
        ("swat", "ring", True),
        ("Mistral", "static", True),
        pytest.param("swat", "static", True, marks=pytest.mark.slow),
        pytest.param("Mistral", "ring", False, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_stays_two_programs(name, kind, padded):
    """Through generate's own preparation; 1 program with the lengths as numbers, 1 with them as symbols."""
    torch._dynamo.reset()
    model, steps = (swat_model if name == "swat" else partial(other_model, name))(num_hidden_layers=1), []
    counter = CompileCounter()
    for step in (model, torch.compile(model, backend=counter, fullgraph=True)):
        cache = SwatCache(model.config) if kind == "ring" else StaticCache(model.config, max_cache_len=64)
        mask = left_padded(padding=4)
        logits = []
        with torch.no_grad():
            model(tokens(), cache=cache, attention_mask=mask if padded else None, use_cache=True)
            for i in range(6):
                mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
                inputs = model.prepare_inputs_for_generation(
                    tokens(2, 1, seed=i), cache=cache, attention_mask=mask if padded else None,
                    position_ids=torch.full((2, 1), 13 + i), use_cache=True,
                )  # fmt: skip
                logits.append(step(**inputs).logits)
        steps.append(torch.cat(logits, 1))
    torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=1e-10)
    assert counter.frame_count <= 2
