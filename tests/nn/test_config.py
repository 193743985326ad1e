"""Configurations: the paper's rows, what is refused, the way to a dictionary and back."""

import json
import math
import pickle

import pytest
import torch

from swat_flex import SwatConfig, SwatTransformer, alibi_slopes, balanced_alibi_slopes
from swat_flex.nn import PAPER

WIDE = {"vocab_size": 50257, "hidden_size": 768, "layers": 12, "heads": 12}
SOFTMAX = {"activation": "softmax", "slopes": None, "rope": True}
# arXiv 2502.18845, Table 2: softmax models, (window, training length).
TABLE_2 = {
    "full attention, trained at 128": {**SOFTMAX, "window": None},
    "sliding, window 128, trained at 1,024": {**SOFTMAX, "window": 128},
    "sliding, window 1,024, trained at 4,096": {**SOFTMAX, "window": 1024},
    "full attention, trained at 4,096": {**SOFTMAX, "window": None},
}
# Table 3.
TABLE_3 = {
    "full softmax RoPE": {**SOFTMAX, "window": None},
    "full sigmoid RoPE": {"activation": "sigmoid", "slopes": None, "window": None},
    "sliding softmax RoPE": {**SOFTMAX, "window": 128},
    "sliding sigmoid ALiBi 12:0": {"slopes": "12:0", "rope": False, "window": 128},
    "sliding sigmoid ALiBi 8:4": {"slopes": "8:4", "rope": False, "window": 128},
    "sliding sigmoid ALiBi 6:6": {"slopes": "6:6", "rope": False, "window": 128},
    "sliding sigmoid ALiBi 6:6, trained at 2,048": {"slopes": "6:6", "rope": False, "window": 128},
    "sliding sigmoid AliRope 6:6": {"slopes": "6:6", "window": 128},
    "sliding sigmoid AliRope 6:6, window 1,024": {"slopes": "6:6", "window": 1024},
}


@pytest.mark.parametrize("row", [*TABLE_2.items(), *TABLE_3.items()], ids=lambda row: row[0])
def test_every_row_of_the_papers_tables_is_a_configuration(row):
    _, options = row
    with torch.device("meta"):
        model = SwatTransformer(SwatConfig(**{**WIDE, **PAPER, "tie_embeddings": True, **options}))
    assert 1.1e8 < sum(p.numel() for p in model.parameters()) < 1.4e8
    small = SwatConfig(**{"vocab_size": 11, "hidden_size": 24, "layers": 1, "heads": 12, **PAPER, **options})
    loss = SwatTransformer(small).loss(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 3, 4, 5]]))
    loss.backward()
    assert abs(loss.item() - math.log(11)) < 0.5


def test_balanced_is_the_papers_even_split():
    even = SwatConfig(heads=12, slopes="6:6").head_slopes()
    assert torch.equal(even, balanced_alibi_slopes(12))
    assert torch.equal(even, SwatConfig(heads=12, slopes="balanced").head_slopes())
    assert (SwatConfig(heads=12, slopes="8:4").head_slopes() < 0).tolist() == [True] * 8 + [False] * 4
    assert SwatConfig(heads=12, slopes="12:0", slope_schedule="2^-8k/h").head_slopes()[11] == -(2.0**-8)


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"vocab_size": 0}, ValueError, ["vocab_size", "at least 1", "0"]),
        ({"layers": 2.0}, TypeError, ["layers", "int", "float"]),
        ({"heads": True}, TypeError, ["heads", "int", "bool"]),
        ({"kv_heads": 5}, ValueError, ["kv_heads", "divisor of heads = 12", "5"]),
        ({"hidden_size": 100}, ValueError, ["hidden_size", "multiple of heads = 12", "100"]),
        ({"head_dim": 258}, ValueError, ["head_dim", "256", "258"]),
        ({"head_dim": 7}, ValueError, ["head_dim", "even", "7"]),
        ({"window": 0}, ValueError, ["window", "at least 1", "0"]),
        ({"window": (4, 4)}, ValueError, ["window", "12", "2"]),
        ({"activation": "relu"}, ValueError, ["activation", "'sigmoid', 'softmax'", "'relu'"]),
        ({"slopes": "6:5"}, ValueError, ["slopes", "heads = 12", "'6:5'"]),
        ({"slopes": "steep"}, ValueError, ["slopes", "negative:positive", "'steep'"]),
        ({"slopes": 1.0}, TypeError, ["slopes", "float"]),
        ({"slope_schedule": "2^-2k"}, ValueError, ["slope_schedule", "'2^-k'", "'2^-2k'"]),
        ({"logit_bias": "-log(window)", "window": None}, ValueError, ["logit_bias", "window is None"]),
        ({"logit_bias": "one"}, ValueError, ["logit_bias", "'unit', '-log(window)'", "'one'"]),
        ({"window": None}, ValueError, ["assumed_length", "window is None", "None"]),
        ({"window": None, "assumed_length": 1}, ValueError, ["assumed_length", "at least 2", "1"]),
        ({"window": 1}, ValueError, ["logit_bias", "window is 1", "'unit'"]),
        ({"logit_bias": math.nan}, ValueError, ["logit_bias", "finite", "nan"]),
        ({"logit_bias": True}, TypeError, ["logit_bias", "bool"]),
        ({"rope": 1}, TypeError, ["rope", "bool", "int"]),
        ({"norm_eps": 0.0}, ValueError, ["norm_eps", "positive", "0.0"]),
        ({"backend": "fast"}, ValueError, ["backend", "'auto'", "'fast'"]),
    ],
)
def test_a_wrong_value_is_refused_with_argument_rule_and_value(options, error, parts):
    with pytest.raises(error) as caught:
        SwatConfig(**options)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_dictionary_json_and_pickle_give_the_same_back():
    config = SwatConfig(layers=3, window=(4, None, 8), slopes="8:4", kv_heads=4, assumed_length=100)
    assert SwatConfig.from_dict(config.to_dict()) == config
    assert SwatConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="got 'depth'"):
        SwatConfig.from_dict({"depth": 3})


def test_the_default_is_the_recipe():
    config = SwatConfig(heads=12, window=64)
    assert torch.equal(config.head_slopes(), alibi_slopes(12))
    assert config.rope
    assert config.root_norm
    assert config.learns_slopes
    assert config.learns_logit_bias
    weights = torch.sigmoid(config.head_slopes()[:, None] * torch.arange(64) + config.bias_of(64)[:, None])
    torch.testing.assert_close(weights.sum(1), torch.full((12,), 1 / 16))


def test_a_layer_without_a_window_has_the_bias_of_the_length_assumed():
    config = SwatConfig(heads=4, layers=2, window=(None, 8), assumed_length=100)
    assert torch.equal(config.bias_of(None), config.bias_of(100))
    assert not torch.equal(config.bias_of(None), config.bias_of(8))


@pytest.mark.parametrize("window", [None, 1, 64])
def test_a_softmax_and_no_slopes_leave_nothing_to_learn(window):
    """A bias common to a row's logits cancels in a softmax."""
    config = SwatConfig(
        vocab_size=11, hidden_size=24, layers=1, heads=4, activation="softmax", slopes=None, window=window
    )
    assert config.bias_of(window) is None
    assert not [name for name, p in SwatTransformer(config).named_parameters() if "slopes" in name or "bias" in name]


def test_level_heads_have_a_unit_bias_too():
    assert SwatConfig(heads=4, slopes=None, root_norm=False).bias_of(64).tolist() == pytest.approx([-math.log(63)] * 4)
    assert SwatConfig(heads=4, slopes=None).bias_of(64).tolist() == pytest.approx([-math.log(16 * 64 - 1)] * 4)


def test_a_model_described_before_the_recipe_stays_as_it_was():
    """What `to_dict` gave then: every field of that time, assumed_length and root_norm not among them."""
    old = {**SwatConfig(heads=4, hidden_size=24, layers=1, vocab_size=11).to_dict(), **PAPER}
    del old["assumed_length"], old["root_norm"]
    config = SwatConfig.from_dict(old)
    assert not config.learns_slopes
    assert not config.root_norm
    assert config.bias_of(512) is None
    assert not [name for name in SwatTransformer(config).state_dict() if "slopes" in name or "bias" in name]
