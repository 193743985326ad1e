"""`attn_implementation="swat_flex"`: what transformers' own models see through it."""

import warnings

import pytest
import torch
from hf_models import left_padded, other_model, swat_model, tokens
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, masking_utils

from swat_flex import SwatTransformer, naive_swat
from swat_flex.hf import swat_attention, swat_mask
from swat_flex.nn import SwatConfig

NAMES = ("Mistral", "Qwen2", "Qwen3", "Llama")
POSITIONS = torch.cat((torch.arange(4), torch.arange(6), torch.arange(3)))[None]
LENGTHS = torch.tensor([0, 4, 10, 13], dtype=torch.int32)


def gradients(model, implementation, shown, **inputs):
    """(logits, gradient of every parameter) of a loss over the shown tokens."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(tokens(), use_cache=False, **inputs).logits[shown]
    logits.sin().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_another_model_has_the_papers_attention_unless_told_otherwise():
    module = other_model("Llama").model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, 4, 9, 8, dtype=torch.float64).unbind()
    out, _ = swat_attention(module, q, k[:, ::2], v[:, ::2], None)
    torch.testing.assert_close(out, naive_swat(q, k[:, ::2], v[:, ::2], None).transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inputs", ["plain", "padded", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_with_a_softmax_it_is_transformers_own_attention(name, inputs):
    """Window, padding, packing, grouped heads and scale, by values and all gradients in float64."""
    model = other_model(name)
    shown, given = torch.ones(2, 13, dtype=torch.bool), {}
    if inputs == "padded":
        given = {"attention_mask": left_padded()}
        shown = left_padded().bool()
    elif inputs == "packed":
        given = {"position_ids": POSITIONS.expand(2, -1)}
    model.config.swat_flex = {"activation": "softmax", "slopes": None}
    theirs, their_gradients = gradients(model, "sdpa", shown, **given)
    ours, our_gradients = gradients(model, "swat_flex", shown, **given)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    for parameter, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[parameter], rtol=1e-8, atol=1e-10, msg=parameter)


@pytest.mark.parametrize("bias", ["-log(window)", "unit"])
def test_mistral_with_it_is_our_model(bias):
    """The same weights in both: same slopes, bias, window, rope and heads. transformers' rope is float32."""
    names = {
        "self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value", "self_attn.o_proj": "attention.out",
        "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm",
        "model.layers": "blocks", "model.embed_tokens": "embedding", "lm_head": "head", "model.norm": "norm",
    }  # fmt: skip
    mistral = other_model("Mistral", rms_norm_eps=1e-5)
    mistral.config.swat_flex = {"slopes": "3:1", "slope_schedule": "2^-8k/h", "logit_bias": bias}
    ours = SwatTransformer(
        SwatConfig(
            vocab_size=61, hidden_size=32, layers=2, heads=4, kv_heads=2, intermediate_size=48, window=5,
            slopes="3:1", slope_schedule="2^-8k/h", logit_bias=bias, learnable_slopes=False, learnable_logit_bias=False,
            qk_norm=False, root_norm=False,
        )
    ).double()  # fmt: skip
    state = {}
    for name, weight in mistral.state_dict().items():
        mine = name
        for theirs, new in names.items():
            mine = mine.replace(theirs, new)
        state[mine] = weight
    ours.load_state_dict(state)
    x, mask = tokens(), left_padded()
    torch.testing.assert_close(mistral(x).logits, ours(x), rtol=0, atol=1e-4)
    padded = mistral(x, attention_mask=mask).logits
    torch.testing.assert_close(padded[mask.bool()], ours(x, mask=mask.bool())[mask.bool()], rtol=0, atol=1e-4)
    packed = ours(x, document_ids=torch.bucketize(torch.arange(13), LENGTHS, right=True).to(torch.int32))
    torch.testing.assert_close(mistral(x, position_ids=POSITIONS, use_cache=False).logits, packed, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [1, 4, 40])
@pytest.mark.parametrize("name", ["swat", "Mistral"])
def test_packed_documents_are_as_if_alone(name, window):
    """By position_ids that start again, and by cumulative lengths, as transformers' flattening collator gives them."""
    model = (
        swat_model(sliding_window=window, logit_bias=-1.0)
        if name == "swat"
        else other_model("Mistral", sliding_window=window)
    )
    x = tokens(1)
    alone = torch.cat([model(part).logits for part in x.split([4, 6, 3], dim=1)], 1)
    lengths = {"cu_seq_lens_q": LENGTHS, "cu_seq_lens_k": LENGTHS, "max_length_q": 6, "max_length_k": 6}
    for given in ({"position_ids": POSITIONS}, dict(position_ids=POSITIONS, **lengths)):
        together = model(x, use_cache=False, **given).logits
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    if name == "swat":
        ids = torch.tensor([[7] * 4 + [0] * 6 + [3] * 3])
        torch.testing.assert_close(model(x, document_ids=ids).logits, alone, rtol=0, atol=1e-5)  # rope goes on
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected a batch of one packed row, got 2 rows"):
        model(x.repeat(2, 1), use_cache=False, **lengths)


@pytest.mark.parametrize("given", ["padded", "packed"])
def test_a_compiled_model_is_two_programs(given):
    torch._dynamo.reset()
    model, counter = other_model("Mistral", num_hidden_layers=1), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (13, 17, 20):
        inputs = {
            "padded": {"attention_mask": left_padded(length=length)},
            "packed": {"position_ids": (torch.arange(length) % 6).expand(2, -1)},
        }[given]
        x = tokens(2, length)
        ours = compiled(x, use_cache=False, **inputs).logits
        torch.testing.assert_close(ours, model(x, use_cache=False, **inputs).logits, rtol=0, atol=1e-10)
    assert counter.frame_count <= 2


def test_a_mask_is_ids_and_never_square():
    causal = masking_utils.causal_mask_function
    assert swat_mask(2, 5, 5, mask_function=causal) is None
    mask = torch.tensor([[False, True, True, True, True]])
    assert swat_mask(1, 1, 3, 4, 2, attention_mask=mask).tolist() == [[[[0, 0, 0]]]]
    assert swat_mask(1, 5, 5, attention_mask=mask).tolist() == [[[[-1, 0, 0, 0, 0]]]]
    static = swat_mask(1, 1, 8, torch.tensor(4), attention_mask=mask)
    assert static.tolist() == [[[[-1, 0, 0, 0, 0, -1, -1, -1], [5] * 8]]]
    assert swat_mask(2, 10**6, 10**6, attention_mask=torch.ones(2, 10**6, dtype=torch.bool)).numel() == 2 * 10**6


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (masking_utils.bidirectional_mask_function, {}),
        (masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)), {}),
        (
            masking_utils.or_masks(
                masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.zeros(1, 5))
            ),
            {},
        ),
        (masking_utils.causal_mask_function, {"use_vmap": True}),
        (masking_utils.causal_mask_function, {"allow_is_bidirectional_skip": True}),
    ],
)
def test_another_pattern_is_refused(function, options):
    with pytest.raises(NotImplementedError, match="attn_implementation: 'swat_flex' expects causal or sliding"):
        swat_mask(1, 5, 5, mask_function=function, **options)


def test_what_it_cannot_do_is_refused():
    module = other_model("Mistral").model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, 4, 6, 8, dtype=torch.float64).unbind()
    out, weights = swat_attention(module, q, k[:, :2], v[:, :2], None, scaling=0.3, sliding_window=3)
    assert weights is None
    exact = naive_swat(q, k[:, :2], v[:, :2], 3, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    for options, message in (
        ({"dropout": 0.1}, "attention_dropout: expected 0"),
        ({"softcap": 30.0}, "softcap: expected None"),
        ({"is_causal": False}, "is_causal: expected True"),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=message):
            swat_attention(module, q, k, v, None, **options)
    with pytest.raises(ValueError, match=r"attention_mask: expected None, .* got shape \[2, 13\]"):
        swat_attention(module, q, k, v, torch.ones(2, 13))
    for chosen, message in (
        ({"slope": "alibi"}, "config.swat_flex: expected any of slopes"),
        ({"slopes": "1:1"}, "slopes: "),
        ({"logit_bias": "-log(window)"}, "config.swat_flex: expected a logit_bias in numbers"),
    ):
        model = other_model("Mistral", sliding_window=None, swat_flex=chosen)
        with pytest.raises(ValueError, match=message):
            model(tokens())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_chosen_is_the_papers(name):
    """Balanced slopes and no bias in transformers' models, in layers with a window and without, whatever ours has."""
    for layer in other_model(name, head_dim=8).model.layers:
        q, k, v = torch.randn(3, 1, 4, 6, 8, dtype=torch.float64).unbind()
        window = getattr(layer.self_attn, "sliding_window", None)
        out, _ = swat_attention(layer.self_attn, q, k[:, :2], v[:, :2], None, sliding_window=window)
        exact = naive_swat(q, k[:, :2], v[:, :2], window, scale=8**-0.5, slopes="balanced", logit_bias=None)
        torch.testing.assert_close(out, exact.transpose(1, 2), rtol=0, atol=1e-12)


def test_a_softmax_checkpoint_is_told_apart(tmp_path):
    def said(model):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(tokens())
        return [str(warning.message) for warning in caught if "swat_flex" in str(warning.message)]

    softmax = other_model("Mistral", attn_implementation="sdpa")
    softmax(tokens())
    softmax.save_pretrained(tmp_path / "softmax")
    switched = AutoModelForCausalLM.from_pretrained(tmp_path / "softmax", attn_implementation="swat_flex")
    assert "does not become a sigmoid one" in "".join(said(switched))
    assert said(switched) == []  # once
    switched.save_pretrained(tmp_path / "switched")  # still not said to be trained
    assert said(AutoModelForCausalLM.from_pretrained(tmp_path / "switched", attn_implementation="swat_flex"))
    fresh = other_model("Mistral")
    assert said(fresh) == []
    fresh.save_pretrained(tmp_path / "fresh")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fresh", attn_implementation="swat_flex")
    assert loaded.config.swat_flex is True
    assert said(loaded) == []
