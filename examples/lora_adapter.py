"""Adapt a trained SWAT model with PEFT's LoRA: two small matrices beside each projection learn, the model stays.

It checks itself: the loss on the new text must fall, the model without the adapter must be as it was, and the adapter
loaded from its folder, or merged into the weights, must give the same logits.
"""

import sys
import tempfile

import torch

try:
    from peft import LoraConfig, PeftModel, get_peft_model

    from swat_flex.hf import SwatForCausalLM, SwatModelConfig
except ImportError:
    print('skipped: this example needs transformers and peft; pip install ".[hf]" peft brings them')
    sys.exit()

PERIOD = 7  # a text to learn repeats after so many tokens


def train(model, text: torch.Tensor, steps: int, rate: float) -> float:
    """Train what can be trained; the last loss in nats."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        loss = model(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    model = SwatForCausalLM(
        SwatModelConfig(vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, sliding_window=16)
    )
    old, new = (torch.randint(1, 32, (1, PERIOD)).repeat(1, 10) for _ in range(2))  # [1, 70] each
    print(f"the model on its own text: {train(model, old, 40, 5e-3):.3f} nats")

    before = model.eval()(old).logits.detach()
    # Without target_modules PEFT takes query and value, its choice for Llama.
    projections = ["query", "key", "value", "out", "gate", "up", "down"]
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=projections))
    adapted.print_trainable_parameters()
    with torch.no_grad():
        start = adapted(input_ids=new, labels=new).loss.item()
    end = train(adapted.train(), new, 60, 2e-2)
    print(f"the adapter on another text: {start:.3f} → {end:.3f} nats")
    assert end < start / 2, (start, end)

    adapted.eval()
    with adapted.disable_adapter(), torch.no_grad():
        assert torch.equal(adapted(old).logits, before)
    print("without the adapter the model is as it was, to the bit")

    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = adapted(new).logits
        adapted.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(adapted.unload(), folder).eval()
        torch.testing.assert_close(loaded(new).logits, expected, rtol=0, atol=1e-6)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(new).logits, expected, rtol=1e-3, atol=1e-3)
    print("saved and loaded, or merged into the weights, it gives the same logits")


if __name__ == "__main__":
    main()
