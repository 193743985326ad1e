"""Masks of four dimensions: those that are a window with documents and padding are honoured, all others refused."""

import pytest
import torch
from hf_models import other_model, swat_model, tokens
from transformers import DynamicCache

from swat_flex.hf import SwatCache
from swat_flex.hf.square import square_documents

IDS = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, -1, 0, 0, 1, 1, 1, 2, -1, 3, -1]])


def square(ids, window=None, queries=None):
    """`[B, 1, Q, K]`, True where the last Q queries see a key."""
    keys = ids.shape[1]
    distance = torch.arange(keys)[:, None] - torch.arange(keys)
    shown = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, :, None] & (distance >= 0)
    if window is not None:
        shown &= distance < window
    return shown[:, None, keys - (queries or keys) :]


def additive(shown, hidden):
    return torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, hidden)


@pytest.mark.parametrize("hidden", [None, torch.finfo(torch.float64).min, -torch.inf, -1e4])
@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("name", ["Mistral", "Llama"])
def test_with_a_softmax_it_is_transformers_own(name, window, hidden):
    """Mistral's window is 5: a mask of four dimensions says all, in transformers' attention and in ours."""
    model, x = other_model(name), tokens()
    mask = square(IDS, window) if hidden is None else additive(square(IDS, window), hidden)
    model.config.swat_flex = {"activation": "softmax", "slopes": None}
    found = []
    for implementation in ("sdpa", "swat_flex"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(x, attention_mask=mask, use_cache=False).logits[IDS >= 0]
        logits.sin().sum().backward()
        found.append((logits, model.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [None, 5, 9])
def test_our_model_reads_documents_in_it(window):
    model, x = swat_model(), tokens()
    expected = model(x, document_ids=IDS).logits[IDS >= 0]
    for mask in (square(IDS, window), additive(square(IDS, window), -1e9)):
        torch.testing.assert_close(model(x, attention_mask=mask).logits[IDS >= 0], expected, rtol=0, atol=1e-12)
    loss = model(x, attention_mask=square(IDS, window), labels=x.masked_fill(IDS < 0, -100)).loss
    assert torch.isfinite(loss)
    for narrow in (swat_model(), swat_model(windows=[2, None], assumed_length=9)):
        with pytest.raises(NotImplementedError, match=r"expected documents without a window .* mask with window 4"):
            narrow(x, attention_mask=square(IDS, 4))
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, N\] with a cache or documents"):
        model(x, attention_mask=square(IDS), cache=SwatCache(model.config))


def test_behind_a_cache():
    """Mistral, three tokens and then one behind nine, with padding on the left."""
    model, x = other_model("Mistral"), tokens()
    ids = torch.zeros(2, 13, dtype=torch.int64)
    ids[0, :7] = -1
    whole = model(x, attention_mask=square(ids, 5), use_cache=False).logits
    cache, at = DynamicCache(), 0
    for count in (9, 3, 1):
        until = at + count
        mask = square(ids[:, :until], 5, count)
        logits = model(x[:, at:until], attention_mask=mask, cache=cache).logits
        shown = ids[:, at:until] >= 0
        torch.testing.assert_close(logits[shown], whole[:, at:until][shown], rtol=0, atol=1e-10)
        at = until


@pytest.mark.parametrize("keys", [1, 2, 5, 6])
def test_a_mask_is_what_was_found_or_refused(keys):
    """Of random masks and of bands with a flipped bit: never another mask than the given one."""
    generator = torch.Generator().manual_seed(keys)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    found = 0
    for _ in range(200):
        queries = int(draw(keys, 1)) + 1
        ids = torch.where(draw(4, 1, keys) == 0, -1, draw(3, 1, keys).cumsum(1))
        mask = square(ids, int(draw(keys, 1)) + 1, queries)
        kind = int(draw(3, 1))
        if kind == 1:
            mask[0, 0, int(draw(queries, 1)), int(draw(keys, 1))] ^= True
        elif kind == 2:
            mask = draw(2, 1, 1, queries, keys).bool()
        padding = ~mask.diagonal(keys - queries, 2, 3)  # whatever its row says
        try:
            got, window = square_documents(mask, 1, queries, keys)
        except NotImplementedError:
            assert kind
            continue
        found += kind == 0
        kept = ~padding[:, :, :, None]
        assert torch.equal(square(got, window, queries) & kept, mask & kept)
    assert found > 40


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 1, 13, 13, dtype=torch.bool), "got another pattern"),
        (square(IDS) | (torch.arange(13) < 3), "got another pattern"),
        (square(torch.tensor([[0, 1, 0] + [2] * 10])), "got another pattern"),
        (torch.full((2, 1, 13, 13), -1.0).tril(), "got values between"),
        (torch.full((2, 1, 13, 13), torch.nan), "got values between"),
        (square(IDS).expand(-1, 4, -1, -1), r"got shape \[2, 4, 13, 13\]"),
        (square(IDS)[..., :-1], r"got shape \[2, 1, 13, 12\]"),
        (square(IDS).long(), "got torch.int64"),
    ],
)
@pytest.mark.parametrize("name", ["swat", "Mistral"])
def test_all_others_are_refused(name, mask, message):
    model = swat_model() if name == "swat" else other_model("Mistral")
    with pytest.raises((ValueError, NotImplementedError), match=rf"attention_mask: expected \[B, N\] .*{message}"):
        model(tokens(), attention_mask=mask, use_cache=False)


def test_a_whole_program_cannot_check_it():
    model, x = swat_model(num_hidden_layers=1), tokens()
    with pytest.raises(NotImplementedError, match="a traced program, which cannot check it"):
        torch.export.export(model, (x,), {"attention_mask": square(IDS)})


@pytest.mark.slow
def test_a_compiled_model_leaves_it_out_of_its_programs():
    model, x = swat_model(num_hidden_layers=1), tokens()
    torch._dynamo.reset()
    logits = torch.compile(model, backend="eager")(x, attention_mask=square(IDS)).logits
    torch.testing.assert_close(logits, model(x, attention_mask=square(IDS)).logits, rtol=0, atol=1e-12)
