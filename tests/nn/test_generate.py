"""Decoding with caches equals the full forward; sampling draws what it says."""

from typing import Any

import pytest
import torch

from swat_flex import SwatConfig, SwatTransformer
from swat_flex.nn.sampling import sample

SHAPES: dict[str, dict[str, Any]] = {
    "sigmoid": {"window": 7},
    "windows differ, learnt bias": {"window": (3, 8), "learnable_slopes": True, "logit_bias": -1.0, "qk_norm": True},
    "sliding softmax": {"window": 7, "activation": "softmax", "slopes": None},
    "full softmax": {"window": None, "activation": "softmax", "slopes": None},
    "full sigmoid": {"assumed_length": 9, "window": (None, 4), "rope": False},
}


@pytest.fixture(params=SHAPES, ids=str)
def model(request: pytest.FixtureRequest) -> SwatTransformer:
    options = SHAPES[request.param]
    return SwatTransformer(
        SwatConfig(vocab_size=31, hidden_size=24, layers=2, heads=4, kv_heads=2, init_std=0.2, **options)
    )


def text(batch: int, length: int) -> torch.Tensor:
    return torch.randint(31, (batch, length))


@pytest.mark.parametrize("steps", [[1] * 22, [22], [5, 1, 1, 9, 1, 3, 1, 1], [2] * 11])
def test_any_way_of_feeding_tokens_gives_the_full_forward(model, steps):
    tokens = text(2, 22)
    cache = model.new_cache(2, queries=2, capacity=22)
    with torch.no_grad():
        pieces = [model(part, cache=cache) for part in tokens.split(steps, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=2e-5, rtol=1e-4)


def test_left_padding_changes_nothing(model):
    prompts = [text(1, 9), text(1, 4)]
    padded = torch.cat([prompts[0], torch.cat([text(1, 5), prompts[1]], 1)])
    mask = torch.arange(9)[None] >= torch.tensor([[0], [5]])
    together = model.generate(padded, 12, temperature=0, mask=mask, prefill=4)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 9:], model.generate(prompt, 12, temperature=0)[0, prompt.shape[1] :])


def test_greedy_generation_is_the_full_forwards_argmax(model):
    prompt = text(1, 5)
    out = model.generate(prompt, 20, temperature=0)
    assert out.shape == (1, 25)
    logits = model(out[:, :-1])
    chosen = logits.gather(-1, out[:, 1:, None])[0, 4:, 0]
    assert (logits[0, 4:].amax(-1) - chosen).max() < 1e-4


def test_the_cache_keeps_its_size():
    model = SwatTransformer(SwatConfig(vocab_size=31, hidden_size=24, layers=2, heads=4, window=7))
    cache = model.new_cache(3)
    before = sum(c.nbytes for c in cache)
    with torch.no_grad():
        model(text(3, 50), cache=cache)
    assert sum(c.nbytes for c in cache) == before
    assert cache[0].length.tolist() == [50] * 3


def test_a_compiled_step_is_one_graph_for_every_position():
    model = SwatTransformer(SwatConfig(vocab_size=31, hidden_size=24, layers=2, heads=4, kv_heads=2, window=7))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    tokens = text(2, 40)
    with torch.no_grad():
        step, cache = torch.compile(model, backend=count, fullgraph=True), model.new_cache(2)
        pieces = [step(tokens[:, i : i + 1], cache=cache) for i in range(40)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), atol=2e-5, rtol=1e-4)
    assert len(graphs) == 1


def test_a_bfloat16_model_generates():
    model = SwatTransformer(
        SwatConfig(vocab_size=31, hidden_size=24, layers=2, heads=4, window=(7, None), assumed_length=9)
    ).bfloat16()
    assert model.generate(text(2, 9), 9, prefill=4).shape == (2, 18)


def test_generation_streams_stops_and_repeats_with_a_seed():
    model = SwatTransformer(SwatConfig(vocab_size=4, hidden_size=24, layers=1, heads=4, window=7))
    seen: list[torch.Tensor] = []
    draw = torch.Generator().manual_seed(3)
    out = model.generate(torch.zeros(3, 2, dtype=torch.int64), 60, stop=3, generator=draw, stream=seen.append)
    assert torch.equal(torch.stack(seen, 1), out[:, 2:])
    for row in out.tolist():
        assert row[row.index(3) :] == [3] * (len(row) - row.index(3))
    assert out.shape[1] < 62
    again = model.generate(torch.zeros(3, 2, dtype=torch.int64), 60, stop=3, generator=draw.manual_seed(3))
    assert torch.equal(out, again)


def test_sampling_keeps_to_top_k_and_top_p():
    p = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    logits = p.log().expand(4000, 4)
    draws = torch.bincount(sample(logits), minlength=4) / 4000
    torch.testing.assert_close(draws, p[0], atol=0.05, rtol=0)
    assert sample(logits, top_k=2).unique().tolist() == [0, 2]
    assert sample(logits, top_p=0.5).unique().tolist() == [0]
    assert sample(logits, top_p=0.51).unique().tolist() == [0, 2]
    assert sample(logits, temperature=0).unique().tolist() == [0]
    cold = torch.bincount(sample(logits, temperature=0.5), minlength=4) / 4000
    torch.testing.assert_close(cold, p[0] ** 2 / (p**2).sum(), atol=0.05, rtol=0)


def test_a_single_padding_token_sees_nothing_and_does_not_count(model):
    attention = model.blocks[-1].attention
    caches = [model.new_cache(2, capacity=22)[-1] for _ in range(2)]
    x, keep = torch.randn(2, 6, 24), torch.tensor([[True], [False]])
    with torch.no_grad():
        for cache in caches:
            attention(x[:, :4], cache=cache)
        padded = attention(x[:, 4:5], cache=caches[0], mask=keep)
        alone = attention(x[:, 4:5], cache=caches[1])
        torch.testing.assert_close(padded[0], alone[0])
        assert padded[1].abs().max() == 0
        assert caches[0].length.tolist() == [5, 4]
        torch.testing.assert_close(attention(x[:, 5:], cache=caches[0])[0], attention(x[:, 5:], cache=caches[1])[0])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"temperature": -1.0}, ["temperature", "at least 0", "-1.0"]),
        ({"top_k": 0}, ["top_k", "at least 1", "0"]),
        ({"top_p": 0.0}, ["top_p", "0 < top_p ≤ 1", "0.0"]),
        ({"mask": torch.ones(1, 3, dtype=torch.bool)}, ["mask", "[1, 2]", "[1, 3]"]),
        ({"prefill": 0}, ["prefill", "at least 1", "0"]),
    ],
)
def test_wrong_arguments_are_refused(options, parts):
    model = SwatTransformer(SwatConfig(vocab_size=4, hidden_size=8, layers=1, heads=2, window=2))
    with pytest.raises(ValueError, match=parts[0]) as caught:
        model.generate(torch.zeros(1, 2, dtype=torch.int64), 1, **options)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_full_layer_asks_for_a_capacity():
    model = SwatTransformer(SwatConfig(vocab_size=4, hidden_size=8, layers=1, heads=2, window=None, assumed_length=9))
    with pytest.raises(ValueError, match="capacity: expected a number of tokens"):
        model.new_cache(1)
