"""`swat-flex generate`: text from a trained model, as it comes."""

from __future__ import annotations

import codecs
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from swat_flex.cli import options
from swat_flex.training import SEPARATOR, load_model


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the folder of a run for its newest.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option(help="Most bytes to add.")] = 500,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely byte.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely bytes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest bytes that reach this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Repeats a text; without it each is new.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Continue a prompt with a trained model, in constant memory, until a document ends."""
    place = options.device(device)
    try:
        model = load_model(checkpoint, place).eval()
        if place.type == "cuda":
            model.bfloat16()
        draw = torch.Generator(place)
        draw.seed() if seed is None else draw.manual_seed(seed)
        start = torch.tensor([[SEPARATOR, *prompt.encode()]], device=place)
        writer = _Writer(prompt)
        model.generate(
            start, tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=SEPARATOR, generator=draw,
            stream=writer,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    writer.end()


class _Writer:
    """Prints bytes as they come, a character once it is whole."""

    def __init__(self, prompt: str) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.terminal = sys.stdout.isatty()
        self.count, self.began = 0, time.perf_counter()
        self._write(prompt)

    def __call__(self, tokens: Tensor) -> None:
        self.count += 1
        value = int(tokens[0])
        if value < 256:  # ids from 256 on are no bytes
            self._write(self.decoder.decode(bytes([value])))

    def _write(self, text: str) -> None:
        if self.terminal:  # a model must not drive it: an escape sequence can do more than print
            text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        self._write(self.decoder.decode(b"", final=True) + "\n")
        seconds = time.perf_counter() - self.began
        typer.echo(f"{self.count} bytes, {self.count / seconds:.0f} per second, prompt included in the time", err=True)
