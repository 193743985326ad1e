"""`write_folder`: a trained byte model as a folder that transformers loads: weights, tokenizer, settings and a card."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from autotune.files import synchronise_folder
from swat_flex.hf.causal import SwatForCausalLM
from swat_flex.nn import SwatTransformer

SEPARATOR_TEXT = "<|document|>"


def write_folder(model: SwatTransformer, folder: Path, *, separator: int, card: str) -> None:
    """Write the whole folder or none: beside it first, each file on the disk, then renamed.

    Args:
        model: of bytes; ids 0 to 255 are the bytes themselves.
        folder: must not exist.
        separator: the id that stands before every document and so ends the one before.
        card: README.md, in Markdown.

    Raises:
        FileExistsError: the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"folder: expected a path that does not exist, got {str(folder)!r}")
    ids = {"bos_token_id": separator, "eos_token_id": separator, "pad_token_id": separator}
    ours = SwatForCausalLM.from_swat(model, **ids)
    ours.generation_config = GenerationConfig(**ids, do_sample=True, temperature=0.8)  # as `swat-flex generate`
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        ours.save_pretrained(partial)
        byte_tokenizer(separator).save_pretrained(partial)
        (partial / "README.md").write_text(card)
        for path in partial.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        partial.chmod(0o755)  # mkdtemp's own is for its maker alone
        synchronise_folder(partial)
        partial.rename(folder)
        synchronise_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def byte_tokenizer(separator: int) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: each byte of the UTF-8 text is its own id, and the separator stands before the text.

    Every text comes back as it was: one that spells the separator is read as its bytes.

    >>> byte_tokenizer(256)("né").input_ids
    [256, 110, 195, 169]

    Args:
        separator: id of the one special token, at the beginning, at the end and as padding, from 256 on.
    """
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Ids between the bytes and the separator are never trained: the vocabulary is filled with names that no text has.
    tokenizer.add_special_tokens([AddedToken(f"<|unused {i}|>", special=True) for i in range(256, separator)])
    tokenizer.add_special_tokens([AddedToken(SEPARATOR_TEXT, special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR_TEXT} $A",
        pair=f"{SEPARATOR_TEXT} $A {SEPARATOR_TEXT} $B",
        special_tokens=[(SEPARATOR_TEXT, separator)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SEPARATOR_TEXT, eos_token=SEPARATOR_TEXT, pad_token=SEPARATOR_TEXT,
        padding_side="left", clean_up_tokenization_spaces=False, split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def model_card(name: str, state: dict[str, Any]) -> str:
    """A page about a model of `swat-flex train`: what it read, how large it is, how good, and how to use it.

    Args:
        name: of the folder.
        state: the checkpoint, as `load_checkpoint` gives it.
    """
    model, training, corpus = (state.get(key, {}) for key in ("model_config", "training_config", "corpus"))
    text = corpus.get("folder") or "Python's standard library without its tests"
    weights = {weight.data_ptr(): weight for weight in state["model"].values()}  # a tied head has two names
    rows = {
        "Parameters": f"{sum(weight.numel() for weight in weights.values()):,}",
        "Layers, heads, channels": f"{model['layers']}, {model['heads']}, {model['hidden_size']}",
        "Window (tokens)": model["window"],
        "Attention": f"{model['activation']}, slopes {model['slopes']}",
        "Text": f"{text} (files {corpus.get('pattern', '*')})",
        "Steps": f"{state['step']:,}",
        "Rows × tokens of a step": f"{training.get('batch')} × {training.get('length')}",
        "Peak learning rate, seed": f"{training.get('learning_rate')}, {training.get('seed')}",
    }
    if state.get("evaluated") is not None:
        step, bits = state["evaluated"]
        rows["Held-out text"] = f"{bits:.3f} bits per byte after step {step:,}"
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [swat_flex, sliding-window-attention, sigmoid-attention]
---

# {name}

A language model of bytes with sliding-window attention (SWAT, arXiv 2502.18845), trained by `swat-flex train`.

| | |
|---|---|
{table}

```python
import swat_flex.hf  # or trust_remote_code=True below
from transformers import pipeline

print(pipeline("text-generation", model={name!r})("def ")[0]["generated_text"])
```
"""
