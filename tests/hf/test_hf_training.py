"""Loss, checkpointing and the Trainer."""

import pytest
import torch
import torch.nn.functional as F
from hf_models import VOCABULARY, other_model, swat_model, tokens
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from swat_flex.nn import chunked_cross_entropy


def test_the_loss_is_transformers_own():
    model = swat_model()
    x = tokens()
    labels = x.masked_fill(x < 20, -100)
    out = model(x, labels=labels)
    expected = model.loss_function(logits=out.logits, labels=labels, vocab_size=VOCABULARY)
    torch.testing.assert_close(out.loss, expected.double(), rtol=0, atol=1e-5)  # theirs is float32
    counted = int((labels[:, 1:] != -100).sum())
    halves = [model(x[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=counted).loss for i in range(2)]
    torch.testing.assert_close(sum(halves), out.loss, rtol=0, atol=1e-10)
    shifted = model(x, shift_labels=F.pad(labels, (0, 1), value=-100)[:, 1:]).loss
    assert torch.equal(shifted, out.loss)
    nothing = model(x, labels=torch.full_like(x, -100), num_items_in_batch=torch.tensor(5)).loss
    nothing.backward()
    assert nothing.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert model.train()(x, labels=labels).logits is None
    assert model(x, labels=labels, skip_logits=False).logits is not None


def test_a_summed_chunked_loss_is_the_sum():
    hidden, weight, targets = torch.randn(3, 7, 8), torch.randn(11, 8), torch.randint(11, (3, 7))
    for chunk in (None, 2, 5):
        total = chunked_cross_entropy(hidden, weight, targets, chunk=chunk, reduction="sum")
        torch.testing.assert_close(total, chunked_cross_entropy(hidden, weight, targets) * 21)
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'sum'"):
        chunked_cross_entropy(hidden, weight, targets, reduction="none")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its old name, which all of 5.x has
def test_gradient_checkpointing_changes_no_gradient():
    model = swat_model(learnable_slopes=True).train()
    found = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == on
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["swat", "Mistral"])
def test_a_flattened_batch_trains_as_its_documents(name):
    model = (swat_model() if name == "swat" else other_model("Mistral")).train()
    documents = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in (5, 9, 3)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents)
    together = model(**batch, use_cache=False).loss
    alone = [model(torch.tensor([d["input_ids"]]), labels=torch.tensor([d["input_ids"]])).loss for d in documents]
    counts = torch.tensor([4, 8, 2])
    torch.testing.assert_close(together, (torch.stack(alone) * counts).sum() / 14, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["swat", "tied", "Mistral"])
def test_the_trainer_trains_saves_and_resumes(name, tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    make = {
        "swat": lambda: swat_model(dtype=torch.float32, initializer_range=0.02),
        "tied": lambda: swat_model(dtype=torch.float32, initializer_range=0.02, tie_word_embeddings=True),
        "Mistral": lambda: other_model("Mistral", dtype=torch.float32, initializer_range=0.02),
    }[name]
    texts = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]

    def trainer(model, steps):
        return Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
                lr_scheduler_type="constant", gradient_accumulation_steps=2, gradient_checkpointing=True,
                eval_strategy="steps", eval_steps=4, save_steps=4, logging_steps=1, report_to=[], use_cpu=True,
                disable_tqdm=True, seed=0,
            ),
            train_dataset=texts,
            eval_dataset=texts,
        )  # fmt: skip

    first = trainer(make(), 8)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    again = trainer(make(), 8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert again.evaluate()["eval_loss"] == pytest.approx(first.evaluate()["eval_loss"], abs=1e-4)
