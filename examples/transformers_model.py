"""Train one of transformers' own models from scratch with `attn_implementation="swat_flex"`, and generate with it.

It checks itself: the loss must fall, padding must change nothing, and logits must be the definition's.
"""

import copy
import sys

import torch

try:
    from transformers import MistralConfig, MistralForCausalLM
except ImportError:
    print('skipped: this example needs transformers; pip install ".[hf]" brings it')
    sys.exit()

import swat_flex.hf  # noqa: F401  (registers "swat_flex")

PERIOD = 7  # the text to learn repeats after so many tokens


def main() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        attn_implementation="swat_flex", swat_flex={"slopes": "alibi", "logit_bias": "-log(window)"},
    )  # fmt: skip
    model = MistralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    text = torch.randint(1, 32, (1, PERIOD)).repeat(1, 10)  # [1, 70]
    for step in range(1, 41):
        loss = model(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 10, 20, 40):
            print(f"step {step:2}: loss {loss:.3f} nats")
    assert loss < 0.5, loss

    model.eval()
    prompt = text[:, :20]
    continued = model.generate(prompt, max_new_tokens=21, do_sample=False)
    print(f"{(continued == text[:, :41]).float().mean():.0%} of the tokens continued as the text goes on")

    with torch.no_grad():
        logits = model(prompt).logits
        padded = torch.cat((torch.zeros(1, 5, dtype=torch.int64), prompt), 1)
        mask = (torch.arange(25) >= 5).long()[None]
        moved = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 5:]
        definition = copy.deepcopy(model)
        definition.config.swat_flex = {**config.swat_flex, "backend": "naive"}
        exact = definition(prompt).logits
    torch.testing.assert_close(moved, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)
    print("padding on the left changes nothing, and the logits are the definition's")


if __name__ == "__main__":
    main()
