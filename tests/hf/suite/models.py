"""What transformers' own tests are run on: our model in two configurations, and "swat_flex" in three of its models.

`run.py` puts the package `tests` of transformers on the path.
"""

import unittest

import transformers
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers.models.auto import modeling_auto

from swat_flex.hf import SwatForCausalLM, SwatForSequenceClassification, SwatModel, SwatModelConfig

# The tests find by these names which class takes which labels.
modeling_auto.MODEL_MAPPING_NAMES["swat_flex"] = "SwatModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["swat_flex"] = "SwatForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["swat_flex"] = "SwatForSequenceClassification"

OURS = (SwatModel, SwatForCausalLM, SwatForSequenceClassification)
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
THEIRS = {**SIZES, "max_position_embeddings": 512, "attn_implementation": "swat_flex"}


class Tester:
    """Sizes, a configuration and inputs, under the names that the tests read."""

    batch_size, seq_length, is_training, num_labels, type_sequence_label_size = 13, 7, True, 3, 2

    def __init__(self, make):
        self.make = make
        self.__dict__.update(SIZES)

    def get_config(self):
        return self.make()

    def prepare_config_and_inputs_for_common(self):
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": tokens, "attention_mask": tokens.new_ones(tokens.shape).tril()}


class Common(ModelTesterMixin, GenerationTesterMixin):
    def setUp(self):
        self.model_tester = Tester(self.config)


# Where not said, windows are wider than the texts, as in transformers' own tests: these expect caches that keep all.
class TestSwat(Common, unittest.TestCase):
    all_model_classes = OURS
    has_attentions = False  # to give

    def config(self):
        return SwatModelConfig(**SIZES, sliding_window=64)


class TestSwatMixed(Common, unittest.TestCase):
    """A narrow window and none, and all that can be learnt."""

    all_model_classes = OURS
    has_attentions = False

    def config(self):
        return SwatModelConfig(
            **SIZES, windows=[3, None], qk_norm=True, learnable_slopes=True, learnable_logit_bias=True, logit_bias=-1.0,
            slopes="3:1",
        )  # fmt: skip


def theirs(name):
    return tuple(
        getattr(transformers, f"{name}{kind}")
        for kind in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
    )


class TestMistral(Common, unittest.TestCase):
    all_model_classes = theirs("Mistral")

    def config(self):
        return transformers.MistralConfig(**THEIRS, sliding_window=64)


class TestLlama(Common, unittest.TestCase):
    all_model_classes = theirs("Llama")

    def config(self):
        return transformers.LlamaConfig(**THEIRS)


class TestQwen3(Common, unittest.TestCase):
    all_model_classes = theirs("Qwen3")

    def config(self):
        return transformers.Qwen3Config(
            **THEIRS, head_dim=8, use_sliding_window=True, sliding_window=64, max_window_layers=1
        )  # fmt: skip
