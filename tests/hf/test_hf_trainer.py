"""Other people's loops: the Trainer with packed rows, accumulation, 16 bits and compilation; accelerate; a step is the
same step however its documents are laid out."""

import copy

import pytest
import torch
from hf_models import other_model, swat_model, tokens
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

accelerate = pytest.importorskip("accelerate", reason="the Trainer needs it")

DOCUMENTS = [tokens(1, length, seed=length)[0].tolist() for length in (5, 9, 3, 12, 7, 4, 11, 6)]
ROWS = [{"input_ids": document, "labels": document} for document in DOCUMENTS]


def padded(rows):
    """Rows beside each other, padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def column(name, filling):
        return torch.tensor([[*row[name], *[filling] * (length - len(row[name]))] for row in rows])

    ids = column("input_ids", 0)
    return {"input_ids": ids, "labels": column("labels", -100), "attention_mask": (column("labels", -100) >= 0).long()}


def trained(model, folder, collator=padded, batch=4, accumulation=1, **options):
    """The parameters and losses after two steps with the documents in their order."""
    arguments = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": batch, "learning_rate": 1e-2,
        "gradient_accumulation_steps": accumulation, "optim": "sgd", "max_grad_norm": 5.0, "seed": 0,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False,
        **options,
    }  # fmt: skip
    trainer = Trainer(
        model=copy.deepcopy(model), args=TrainingArguments(**arguments), train_dataset=ROWS, data_collator=collator
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return dict(trainer.model.named_parameters()), torch.tensor(losses)


def assert_same(one, other, tolerance):
    assert one[0].keys() == other[0].keys()
    for name, weight in one[0].items():
        torch.testing.assert_close(weight, other[0][name], rtol=0, atol=tolerance, msg=name)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-4)  # logged with few digits


@pytest.mark.parametrize("lengths", [False, True], ids=["position_ids", "cu_seqlens"])
@pytest.mark.parametrize("name", ["swat", "Mistral"])
def test_a_packed_step_is_the_step_of_separate_rows(name, lengths, tmp_path):
    model = swat_model() if name == "swat" else other_model("Mistral")
    rows = trained(model, tmp_path)
    packed = trained(model, tmp_path, DataCollatorWithFlattening(return_flash_attn_kwargs=lengths))
    assert_same(packed, rows, 1e-6)  # Mistral's rope and loss are float32
    moved = max((rows[0][name] - weight).abs().max() for name, weight in model.named_parameters())
    assert moved > 1e-3


def test_accumulated_steps_are_the_whole_step(tmp_path):
    """Rows of different lengths: each token counts the same, whichever part it is in."""
    model, flat = swat_model(), DataCollatorWithFlattening()
    whole = trained(model, tmp_path)
    assert_same(trained(model, tmp_path, batch=1, accumulation=4), whole, 1e-9)
    assert_same(trained(model, tmp_path, flat, batch=2, accumulation=2), whole, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("swat", "inductor"), ("swat", "aot_eager"), ("Mistral", "aot_eager")])
def test_a_compiled_step_is_the_same_step(name, backend, tmp_path):
    torch._dynamo.reset()
    options = {"dtype": torch.float32, "num_hidden_layers": 1}
    model = swat_model(**options) if name == "swat" else other_model("Mistral", **options)
    flat = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    plain = trained(model, tmp_path, flat)
    assert_same(trained(model, tmp_path, flat, torch_compile=True, torch_compile_backend=backend), plain, 1e-5)


@pytest.mark.parametrize("name", ["swat", "Mistral"])
def test_training_in_16_bits_stays_near(name, tmp_path):
    """bf16=True computes in bfloat16 around float32 weights; a model of bfloat16 weights trains too."""
    make = swat_model if name == "swat" else lambda **options: other_model("Mistral", **options)
    model = make(dtype=torch.float32, initializer_range=0.02)
    whole, losses = trained(model, tmp_path)
    weights, low = trained(model, tmp_path, bf16=True)
    torch.testing.assert_close(low, losses, rtol=0, atol=2e-2)
    for name_, weight in weights.items():
        assert weight.dtype == torch.float32
        moved, exact = (kept[name_] - dict(model.named_parameters())[name_] for kept in (weights, whole))
        assert (moved - exact).norm() <= 0.1 * exact.norm() + 1e-6, name_
    weights, low = trained(copy.deepcopy(model).bfloat16(), tmp_path)
    assert all(weight.dtype == torch.bfloat16 and weight.isfinite().all() for weight in weights.values())
    torch.testing.assert_close(low, losses, rtol=0, atol=5e-2)


def test_accelerates_own_loop_is_a_plain_loop():
    def steps(model, wrap):
        optimizer = torch.optim.SGD(model.parameters(), 1e-2)
        loader = torch.utils.data.DataLoader(ROWS, batch_size=2, collate_fn=padded)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2) if wrap else None
        if wrap:
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for number, batch in enumerate(loader):
            if wrap:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                (model(**batch).loss / 2).backward()
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        return accelerator.unwrap_model(model) if wrap else model

    model = swat_model().train()
    plain, wrapped = steps(copy.deepcopy(model), False), steps(copy.deepcopy(model), True)
    for one, other, start in zip(plain.parameters(), wrapped.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert not torch.equal(one, start)
