"""Train a tiny language model of bytes on a file of Python's standard library, then let it continue a text.

It checks itself: the loss must fall, and the trained model must give the definition's loss (`backend="naive"`).
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch

from swat_flex import SwatConfig, SwatTransformer

STEPS, BATCH, LENGTH = 150, 8, 128
CONFIG = SwatConfig(vocab_size=256, hidden_size=64, layers=2, heads=4, window=32)


def rows(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens and the token that follows each, both int64 `[BATCH, LENGTH]`."""
    first = torch.randint(len(text) - LENGTH, (BATCH, 1))
    taken = text[first + torch.arange(LENGTH + 1)]
    return taken[:, :-1], taken[:, 1:]


def main() -> None:
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    model = SwatTransformer(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text")

    losses = []
    for step in range(1, STEPS + 1):
        tokens, targets = rows(text)
        loss = model.loss(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / math.log(2))
        if step == 1 or step % 30 == 0:
            print(f"step {step:3}: {losses[-1]:.2f} bits per byte")
    assert losses[-1] < losses[0] - 3, losses[-1]

    definition = SwatTransformer(dataclasses.replace(CONFIG, backend="naive"))
    definition.load_state_dict(model.state_dict())
    with torch.no_grad():
        tokens, targets = rows(text)
        ours, exact = model.loss(tokens, targets), definition.loss(tokens, targets)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    print(f"same loss as the definition: {ours:.6f} and {exact:.6f} nats")

    prompt = torch.tensor([list(b"    def ")])
    continued = model.eval().generate(prompt, 60, temperature=0.7)
    print(bytes(continued[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
