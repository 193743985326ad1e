"""Option values from their text. What breaks a rule is `refused`: the option, the rule, the value received."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import typer

from swat_flex.cli import machine
from swat_flex.problem import WindowLike

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def refused(option: str, rule: str, value: object) -> typer.BadParameter:
    """The error to raise for an option's value."""
    return typer.BadParameter(f"expected {rule}, got {value!r}", param_hint=option)


def window(text: str) -> WindowLike:
    """The argument `window` of `flex_swat`: "256", "128,16", "none,0" or "none"."""
    try:
        sides = [None if word.strip() == "none" else int(word) for word in text.lower().split(",")]
    except ValueError:
        sides = []
    match sides:
        case [None]:
            return None
        case [int(keys)] if keys >= 1:
            return keys
        case [left, right] if all(side is None or side >= 0 for side in sides):
            return left, right
    sides_rule = "two sides left,right, each at least 0 or 'none' (128,16)"
    raise refused("--window", f"keys per query, at least 1 (256), {sides_rule}, or 'none' for plain causal", text)


def lengths(text: str) -> list[int]:
    """Sequence lengths in tokens, ascending and each once."""
    try:
        values = sorted({int(word) for word in text.split(",")})
    except ValueError:
        values = []
    if not values or values[0] < 1:
        raise refused("--lengths", "lengths in tokens, each at least 1 (1024,2048,4096)", text)
    return values


def whole(option: str, value: int, least: int, most: int) -> int:
    """A whole number in its range."""
    if not least <= value <= most:
        raise refused(option, f"{least} to {most}", value)
    return value


def head_dim(value: int) -> int:
    """Channels of a head: even, because rotary embedding turns them in pairs."""
    if not 2 <= value <= 256 or value % 2:
        raise refused("--head-dim", "an even number from 2 to 256", value)
    return value


def one_of(option: str, text: str, names: Iterable[str]) -> str:
    """A name from a list."""
    if text not in names:
        raise refused(option, f"one of {', '.join(names)}", text)
    return text


def device(text: str) -> torch.device:
    """A device of this machine; "auto" is the first CUDA device, or the CPU."""
    known = machine.devices()
    if text == "auto":
        return torch.device("cuda:0" if "cuda:0" in known else "cpu")
    name = text if text in known else f"{text}:0"
    if name not in known:
        raise refused("--device", f"'auto' or a device of this machine ({', '.join(known)})", text)
    return torch.device(name)


def dtype(text: str, device: torch.device) -> torch.dtype:
    """A dtype that `flex_swat` takes on the device."""
    if text == "float64" and device.type != "cpu":
        raise typer.BadParameter(f"expected float64 on a CPU only, got it on {device}", param_hint="--dtype")
    return DTYPES[one_of("--dtype", text, DTYPES)]


def picture(path: Path | None) -> Path | None:
    """A file that can be written, with matplotlib here to draw it; found out before any work is done."""
    if path is None:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter(
            f'expected matplotlib to be installed: pip install "swat_flex[plot]", got {str(path)!r} and no matplotlib',
            param_hint="--png",
        )
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "is a directory")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise typer.BadParameter(
            f"expected a file in a folder that can be written, got {str(path)!r}: {error.strerror}", param_hint="--png"
        ) from error
    return path
