"""`SwatForCausalLM`: bit-equal files, the same model as SwatTransformer, the transformers API."""

import json

import pytest
import torch
from hf_models import PLAIN, SIZES, VOCABULARY, left_padded, swat_model, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from swat_flex import unit_logit_bias
from swat_flex.hf import SwatCache, SwatForCausalLM, SwatModel, SwatModelConfig
from swat_flex.nn import PAPER, SwatConfig, SwatTransformer

VARIANTS = {
    "windows": {"windows": [3, None], "qk_norm": True, "logit_bias": -1.0},
    "tied": {"tie_word_embeddings": True, "slopes": "3:1", "slope_schedule": "2^-8k/h"},
    "learnt": {"learnable_slopes": True, "learnable_logit_bias": True, "logit_bias": "-log(window)"},
    "recipe of 9 keys": {"windows": [3, None], "assumed_length": 9},
    "softmax": {
        "activation": "softmax",
        "slopes": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "bfloat16": {"dtype": torch.bfloat16, "learnable_slopes": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_model_gives_the_same_logits_to_the_bit(name, tmp_path):
    model = swat_model(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SwatForCausalLM
    assert loaded.dtype == model.dtype
    assert loaded.config.to_swat() == model.config.to_swat()
    x, mask = tokens(), left_padded()
    for options in ({"use_cache": False}, {"use_cache": True}, {"attention_mask": mask}):
        assert torch.equal(loaded(x, **options).logits, model(x, **options).logits)
    tied = loaded.transformer.head.weight is loaded.transformer.embedding.weight
    assert tied == model.config.tie_word_embeddings


def test_it_is_swat_transformer():
    config = SwatConfig(vocab_size=VOCABULARY, hidden_size=32, layers=2, heads=4, kv_heads=2, window=(3, 7))
    torch.manual_seed(3)
    swat = SwatTransformer(config)
    torch.manual_seed(3)
    model = SwatForCausalLM(SwatModelConfig.from_swat(config))
    assert all(map(torch.equal, model.transformer.state_dict().values(), swat.state_dict().values()))
    x = tokens()
    assert torch.equal(model(x).logits, swat(x))
    shared = SwatForCausalLM.from_swat(swat, eos_token_id=2)
    assert all(a is b for a, b in zip(shared.transformer.parameters(), swat.parameters(), strict=True))
    assert shared.config.eos_token_id == 2
    assert torch.equal(shared(x).logits, swat(x))
    swat.load_state_dict(model.transformer.state_dict())


def test_the_auto_classes_know_it(tmp_path):
    model = swat_model()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SwatModelConfig)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is SwatModel
    out, x = base(tokens(), output_hidden_states=True), tokens()
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(model.lm_head(out.last_hidden_state), model(x).logits, rtol=0, atol=1e-12)
    assert isinstance(model(x, return_dict=False), tuple)


def test_weights_that_a_checkpoint_lacks_are_drawn_as_ours(tmp_path):
    options = {"hidden_size": 256, "initializer_range": 0.05, "slopes": "3:1"}
    model = swat_model(dtype=torch.float32, **options)
    with torch.no_grad():
        model.transformer.blocks[0].attention.slopes.fill_(7.0)
    lost = (
        "layers.1.attention.slopes",
        "layers.1.attention.logit_bias",
        "layers.1.attention.out.weight",
        "layers.0.mlp.up.weight",
        "norm.weight",
    )
    state = {name: w for name, w in model.state_dict().items() if name.removeprefix("model.") not in lost}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, report = SwatForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.removeprefix("model.") for name in report["missing_keys"]} == set(lost)
    drawn = loaded.transformer
    assert torch.equal(drawn.blocks[0].attention.slopes, torch.full((4,), 7.0))
    assert torch.equal(drawn.blocks[1].attention.slopes, model.config.to_swat().head_slopes())
    unit = unit_logit_bias(model.config.to_swat().head_slopes(), 5, 1 / 16)
    assert torch.equal(drawn.blocks[1].attention.logit_bias, unit)
    assert torch.equal(drawn.norm.weight, torch.ones(256))
    assert drawn.blocks[1].attention.out.weight.std().item() == pytest.approx(0.05 / 2, rel=0.05)
    assert drawn.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.05, rel=0.05)


def test_a_config_is_strict_and_comes_back(tmp_path):
    config = SwatModelConfig(**SIZES, **PLAIN, windows=[3, None], logit_bias=-2.5)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "swat_flex"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert SwatModelConfig.from_swat(config.to_swat()).to_swat() == config.to_swat()
    wrong = [
        ({"num_key_value_heads": 3}, "num_key_value_heads: "),
        ({"sliding_window": 0}, "window"),
        ({"slopes": "5:5"}, "slopes: "),
        ({"windows": [3]}, "windows: "),
        ({"layer_types": ["full_attention"] * 2}, "layer_types: "),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters: "),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            SwatModelConfig(**{**SIZES, **options})


def test_a_config_saved_before_the_recipe_stays_as_it_was(tmp_path):
    """Every field of that time is in the file, null where it was None; assumed_length and root_norm are not."""
    SwatModelConfig(**SIZES, **PLAIN, **PAPER).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert saved.keys() >= PAPER.keys()
    del saved["assumed_length"], saved["root_norm"]
    path.write_text(json.dumps(saved))
    config = AutoConfig.from_pretrained(tmp_path).to_swat()
    assert {name: getattr(config, name) for name in PAPER} == PAPER
    assert {name: getattr(SwatModelConfig().to_swat(), name) for name in PAPER} == {
        name: getattr(SwatConfig(), name) for name in PAPER
    }


def test_embeddings_grow(tmp_path):
    model = swat_model()
    before = model(tokens()).logits
    model.resize_token_embeddings(VOCABULARY + 3)
    model.save_pretrained(tmp_path)
    after = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits
    torch.testing.assert_close(after[..., :VOCABULARY], before, rtol=0, atol=1e-12)
    assert after.shape[-1] == VOCABULARY + 3


def test_embeddings_go_in_and_logits_to_keep_come_out():
    model, x = swat_model(), tokens()
    whole = model(x).logits
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(x)).logits, whole)
    for keep in (1, 3, torch.tensor([2, 5])):
        at = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
        torch.testing.assert_close(model(x, logits_to_keep=keep).logits, whole[:, at], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"input_ids: expected either .* got neither"):
        model()
    with pytest.raises(NotImplementedError, match=r"attention_mask: expected \[B, N\]"):
        model(x, attention_mask=torch.ones(2, 1, 13, 13))
    with pytest.raises(ValueError, match="document_ids: expected None with a cache"):
        model(x, cache=SwatCache(model.config), document_ids=torch.zeros_like(x))
