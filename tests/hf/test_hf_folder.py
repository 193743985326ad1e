"""`swat-flex export`: the folder, its tokenizer, its card, and PEFT on the model."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from hf_models import swat_model, tokens
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
from typer.testing import CliRunner

from swat_flex.cli import app
from swat_flex.hf.folder import byte_tokenizer
from swat_flex.nn import SwatConfig, SwatTransformer
from swat_flex.training import SEPARATOR, save_checkpoint
from swat_flex.training.data import VOCAB


@pytest.fixture
def run(tmp_path):
    """(a model, the folder of its checkpoint)."""
    config = SwatConfig(vocab_size=VOCAB, hidden_size=32, layers=2, heads=4, window=8, tie_embeddings=True)
    swat = SwatTransformer(config)
    state = {"step": 3, "model_config": config.to_dict(), "model": swat.state_dict(), "evaluated": (3, 2.5)}
    save_checkpoint(tmp_path / "run", state)
    return swat, tmp_path / "run"


def export(run, out):
    done = CliRunner().invoke(app, ["export", str(run), str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_a_trained_transformer_becomes_a_folder_and_comes_back(run, tmp_path):
    swat, path = run
    out = export(path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded(tokens(), use_cache=False).logits, swat(tokens()))
    swat.load_state_dict(loaded.transformer.state_dict())
    same = {"kv_heads": 4, "head_dim": 8, "intermediate_size": swat.config.mlp_size}
    assert loaded.transformer.config == dataclasses.replace(swat.config, **same)
    config = json.loads((out / "config.json").read_text())
    assert {config["num_key_value_heads"], config["head_dim"], config["intermediate_size"]} == {4, 8, 128}
    settings = GenerationConfig.from_pretrained(out)
    assert {settings.bos_token_id, settings.eos_token_id, settings.pad_token_id} == {SEPARATOR}
    card = (out / "README.md").read_text()
    assert f"| Parameters | {sum(p.numel() for p in swat.parameters()):,} |" in card
    assert "2.500 bits per byte after step 3" in card
    assert "library_name: transformers" in card


@pytest.mark.parametrize(
    ("source", "to", "message"),
    [("run", "run", "folder: expected a path"), ("none", "new", "checkpoint: expected")],
)
def test_nothing_is_overwritten_and_nothing_half_written(run, tmp_path, source, to, message):
    done = CliRunner().invoke(app, ["export", str(tmp_path / source), str(tmp_path / to)])
    assert done.exit_code == 2
    assert message in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_pipeline_writes_text(run, tmp_path):
    swat, path = run
    out = export(path, tmp_path / "out")
    write = pipeline("text-generation", model=str(out))
    said = write("def ", do_sample=False, max_new_tokens=12)[0]["generated_text"]
    expected = swat.generate(torch.tensor([[SEPARATOR, *b"def "]]), 12, temperature=0, stop=SEPARATOR)[0, 1:]
    assert said == bytes(x for x in expected.tolist() if x < SEPARATOR).decode(errors="replace")


def test_every_text_comes_back():
    tokenizer = byte_tokenizer(SEPARATOR)
    every = "".join(map(chr, range(1, 0x250))) + "→ 语 🙂 <|document|>  two  spaces\r\n\0"
    ids = tokenizer(every).input_ids
    assert ids == [SEPARATOR, *every.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == every
    padded = tokenizer(["a", "abc"], padding=True)
    assert padded.input_ids == [[256, 256, 256, 97], [256, 97, 98, 99]]
    assert padded.attention_mask == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert "token_type_ids" not in padded
    assert byte_tokenizer(260)("a").input_ids == [260, 97]


def test_the_tokenizer_comes_back(run, tmp_path):
    out = export(run[1], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "né <|document|> 🙂"
    assert tokenizer(text).input_ids == [SEPARATOR, *text.encode()]
    assert tokenizer.decode([*text.encode(), VOCAB - 1]) == text  # an id that is no token says nothing
    assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size() == SEPARATOR + 1


def test_a_program_that_does_not_import_us_can_load_the_folder(tmp_path):
    """With trust_remote_code; saved again, the folder still holds no copy of the library's code."""
    model = swat_model()
    model.save_pretrained(tmp_path / "out")
    program = """
import sys, torch, transformers
assert "swat_flex" not in sys.modules
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[2])
print(type(model).__module__, model(torch.arange(1, 10)[None]).logits.sum().item())
"""
    again = tmp_path / "again"
    command = [sys.executable, "-c", program, str(tmp_path / "out"), str(again)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kind, total = done.stdout.split()
    assert kind == "swat_flex.hf.causal"
    assert float(total) == pytest.approx(model(torch.arange(1, 10)[None]).logits.sum().item())
    names = {path.name for path in again.iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    assert len((again / "modeling_swat_flex.py").read_text().splitlines()) == 1


@pytest.mark.parametrize("head", [False, True])
def test_lora_adapts_the_projections(head):
    """PEFT's default targets, and the head beside them: the base stays, the adapters learn."""
    peft = pytest.importorskip("peft", reason="no PEFT")
    model = swat_model(dtype=torch.float32).train()
    x = tokens()
    before = model(x, labels=x).loss.item()
    options = {"target_modules": ["query", "value", "lm_head"]} if head else {}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    trained = {name.split(".lora_")[0].split(".")[-1] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"query", "value"} | ({"lm_head"} if head else set())
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    for _ in range(8):
        loss = adapted(x, labels=x).loss
        loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < before - 0.05
    with adapted.disable_adapter():
        assert adapted(x, labels=x).loss.item() == before
