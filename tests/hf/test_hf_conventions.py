"""What transformers and the packages around it expect of any model: parts, head, checkpointing, plans, files."""

import copy
import functools
import subprocess
import sys

import pytest
import torch
import transformers
from hf_models import left_padded, other_model, swat_model, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.generation.continuous_batching import continuous_api

from swat_flex.hf import SwatForCausalLM, SwatForSequenceClassification, SwatModel


class Adapted(nn.Module):
    """A frozen head and a small trained correction, as LoRA makes it; it has no weight of its own."""

    def __init__(self, head):
        super().__init__()
        self.base = head.requires_grad_(False)
        self.correction = nn.Linear(head.in_features, head.out_features, bias=False, dtype=head.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.correction(x)


def test_the_loss_goes_through_the_head():
    """An adapter on the head counts in the loss and is trained."""
    model, x = swat_model().train(), tokens()
    plain = model(x, labels=x).loss
    model.lm_head = Adapted(model.lm_head)
    out = model(x, labels=x, skip_logits=False)
    expected = model.loss_function(logits=out.logits, labels=x, vocab_size=model.config.vocab_size)
    torch.testing.assert_close(out.loss, expected.double(), rtol=0, atol=1e-5)  # theirs is float32
    assert (out.loss - plain).abs() > 1e-3
    out.loss.backward()
    assert model.lm_head.correction.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_a_dynamically_quantized_model_has_a_loss():
    model, x = swat_model(dtype=torch.float32), tokens()
    whole = model(x, labels=x).loss
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert quantized(x, labels=x).loss.item() == pytest.approx(whole.item(), rel=0.05)


def test_an_offloaded_model_has_the_same_loss():
    accelerate = pytest.importorskip("accelerate")
    model, x = swat_model(), tokens()
    whole = model(x, labels=x)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    out = offloaded(x, labels=x)
    assert torch.equal(out.loss, whole.loss)
    assert torch.equal(out.logits, whole.logits)


def test_a_loss_of_ones_own_is_used():
    model, x = swat_model().train(), tokens()

    def loss(logits, labels, vocab_size, weight=1.0, **kwargs):
        return weight * logits.sum() + labels.sum() + vocab_size

    model.loss_function = loss
    out = model(x, labels=x, skip_logits=False)
    assert torch.equal(out.loss, out.logits.sum() + x.sum() + model.config.vocab_size)
    assert torch.equal(model(x, labels=x, weight=2.0).loss, 2 * out.logits.sum() + x.sum() + model.config.vocab_size)


def test_logits_in_training_are_a_switch():
    for skip in (True, False):
        model = swat_model(skip_logits=skip).train()
        assert (model(tokens(), labels=tokens()).logits is None) == skip


def test_the_base_model_is_the_model_without_its_head(tmp_path):
    model, x = swat_model(), tokens()
    assert type(model.base_model) is SwatModel
    assert model.base_model is model.model is model.get_decoder()
    assert torch.equal(model.lm_head(model.model(x).last_hidden_state), model(x).logits)
    model.model.save_pretrained(tmp_path)
    whole = SwatForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(whole.model(x).last_hidden_state, model.model(x).last_hidden_state)


def test_early_exit_drafts_with_the_first_layers():
    model, x = swat_model(num_hidden_layers=3), tokens(1, 9)
    plain = model.generate(x, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(x, max_new_tokens=8, do_sample=False, assistant_early_exit=1), plain)
    model.config.num_hidden_layers = 1
    early = model(x, use_cache=False).logits
    model.config.num_hidden_layers = 3
    model.model.layers = model.model.layers[:1]
    assert torch.equal(early, model(x, use_cache=False).logits)


@pytest.mark.parametrize("names", [("swat", "swat"), ("swat", "Mistral"), ("Mistral", "swat")])
def test_a_draft_and_its_target_are_ours(names):
    made = [swat_model if name == "swat" else functools.partial(other_model, name) for name in names]
    model, draft, x = made[0](), made[1](seed=1, num_hidden_layers=1), tokens(1, 9)
    plain = model.generate(x, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(x, max_new_tokens=12, do_sample=False, assistant_model=draft), plain)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its old name, which all of 5.x has
@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}, {"context_fn": None}])
def test_checkpointing_is_transformers_own(options):
    """With each of its options, on the layers alone, and with the same gradients."""
    model, x = swat_model(learnable_slopes=True).train(), tokens()
    if "context_fn" in options:
        entered = []

        def contexts():
            entered.append(1)
            return torch.enable_grad(), torch.enable_grad()

        options = {"use_reentrant": False, "context_fn": contexts}
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            assert all(layer.gradient_checkpointing for layer in model.model.layers)
        model.zero_grad()
        embedded = model.get_input_embeddings()(x).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=x).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert "context_fn" not in options or len(entered) == len(model.model.layers)


def test_fsdp_plans_name_our_modules():
    model = swat_model()
    names = {name.replace(".0", ".*") for name, _ in model.named_modules()}
    assert set(model.fsdp_plan) == {"model.embed_tokens", "model.layers.*", "model.norm", "lm_head"}
    assert set(model.fsdp_plan) <= names


@pytest.mark.parametrize("variant", ["first exports", "Llama"])
def test_files_of_other_names_load(variant, tmp_path):
    """The names of this library's first exports, and Llama's for the parts that are the same."""
    model, x = swat_model(tie_word_embeddings=variant == "Llama", qk_norm=True), tokens()
    model.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    if variant == "Llama":
        names = {
            ".attention.query_norm.": ".self_attn.q_norm.", ".attention.key_norm.": ".self_attn.k_norm.",
            ".attention.query.": ".self_attn.q_proj.", ".attention.key.": ".self_attn.k_proj.",
            ".attention.value.": ".self_attn.v_proj.", ".attention.out.": ".self_attn.o_proj.",
            ".mlp.gate.": ".mlp.gate_proj.", ".mlp.up.": ".mlp.up_proj.", ".mlp.down.": ".mlp.down_proj.",
            ".attention_norm.": ".input_layernorm.", ".mlp_norm.": ".post_attention_layernorm.",
        }  # fmt: skip
    else:
        names = {
            "model.embed_tokens.": "transformer.embedding.", "model.layers.": "transformer.blocks.",
            "model.norm.": "transformer.norm.", "lm_head.": "transformer.head.",
        }  # fmt: skip
    theirs = {
        functools.reduce(lambda name, pair: name.replace(*pair), names.items(), name): ours[name] for name in ours
    }
    assert theirs.keys() != ours.keys()
    save_file(theirs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(loaded(x).logits, model(x).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == ours.keys()


def test_the_attention_that_a_model_was_trained_with_is_remembered(tmp_path):
    """A reloaded model attends as the saved one; without this library it fails to load."""
    model, x = other_model("Mistral", dtype=torch.float32), tokens()
    logits = model(x).logits
    for step in range(2):
        model.save_pretrained(tmp_path / str(step))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(step))
        assert model.config._attn_implementation == "swat_flex"
        torch.testing.assert_close(model(x).logits, logits, rtol=0, atol=1e-6)
    softmax = AutoModelForCausalLM.from_pretrained(tmp_path / "0", attn_implementation="sdpa")
    assert (softmax(x).logits - logits).abs().max() > 0.1
    softmax.save_pretrained(tmp_path / "softmax")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "softmax").config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "attn_implementation")
    program = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / '0')!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "swat_flex" in done.stderr.splitlines()[-1]
    assert done.returncode


def test_the_parts_of_a_composite_model_are_remembered(tmp_path):
    config = transformers.LlavaConfig()
    config.text_config._attn_implementation = "swat_flex"
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.text_config._attn_implementation == "swat_flex"
    assert loaded.vision_config._attn_implementation is None


def test_the_parts_of_a_small_llama_become_ours(tmp_path):
    llama, model = other_model("Llama", attn_implementation="sdpa"), swat_model(intermediate_size=48, qk_norm=False)
    llama.save_pretrained(tmp_path)
    loaded, report = SwatForCausalLM.from_pretrained(tmp_path, config=model.config, output_loading_info=True)
    assert {name.split(".")[-1] for name in report["missing_keys"]} == {"slopes", "logit_bias"}  # a Llama has none
    theirs = llama.model.layers[1]
    assert torch.equal(loaded.model.layers[1].attention.value.weight, theirs.self_attn.v_proj.weight)
    assert torch.equal(loaded.model.layers[1].mlp.gate.weight, theirs.mlp.gate_proj.weight)
    assert torch.equal(loaded.lm_head.weight, llama.lm_head.weight)


@pytest.mark.parametrize("name", ["swat", "Mistral"])
def test_attention_weights_are_refused(name):
    model = swat_model() if name == "swat" else other_model("Mistral")
    with pytest.raises(NotImplementedError, match="output_attentions: expected False"):
        model(tokens(), output_attentions=True)
    with pytest.raises(NotImplementedError, match="output_attentions: expected False"):
        model.generate(tokens(), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize("name", ["swat", "Mistral"])
def test_continuous_batching_is_refused(name, monkeypatch):
    """Also where a flash kernel is installed, to which transformers would switch a model."""
    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: True)
    model = swat_model(dtype=torch.float32) if name == "swat" else other_model("Mistral", dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="generate_batch: expected `generate`"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
    assert model.config._attn_implementation != "flash_attention_3"


def test_a_classifier_stands_on_the_model(tmp_path):
    model = swat_model()
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier) is SwatForSequenceClassification
    x, mask = tokens(), left_padded()
    out = classifier(x, attention_mask=mask, labels=torch.tensor([0, 2]))
    last = classifier.score(model.model(x, attention_mask=mask).last_hidden_state[:, -1])
    torch.testing.assert_close(out.logits, last)
    out.loss.backward()
    assert classifier.model.layers[0].attention.query.weight.grad.abs().sum() > 0
