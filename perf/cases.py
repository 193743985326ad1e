"""Named cases: the sizes of a layer that somebody runs, each with the reason why it is here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from swat_flex.problem import Problem, WindowLike
from swat_flex.window import Window

Passes = Literal["forward", "both"]  # both: forward and backward
PASSES: tuple[Passes, ...] = ("forward", "both")
WORDS: dict[Passes, str] = {"forward": "forward", "both": "forward and backward"}


@dataclass(frozen=True)
class Case:
    """One attention layer: sizes in elements, lengths and window in tokens.

    Attributes:
        axis: what a scaling suite varies: "length", "window", "heads"; empty elsewhere.
        passes: what is timed.
    """

    name: str
    reason: str
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    window: int
    dtype: str = "bfloat16"
    axis: str = ""
    passes: tuple[Passes, ...] = PASSES

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def decodes(self) -> bool:
        """Tell whether it is a step of decoding: the newest queries after a longer context."""
        return self.q_len < self.kv_len

    @property
    def sizes(self) -> str:
        """Write the sizes for a reader: `B1 H8/2 L4096 D64 W512 float32`."""
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        length = f"{self.q_len}" if self.q_len == self.kv_len else f"{self.q_len}/{self.kv_len}"
        return f"B{self.batch} H{heads} L{length} D{self.head_dim} W{self.window} {self.dtype}"

    def tensors(self, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, Hq, Lq, D]`, k and v `[B, Hkv, Lk, D]`, standard normal, drawn in float32 on the device."""
        draw = torch.Generator(device).manual_seed(seed)
        q_shape = (self.batch, self.q_heads, self.q_len, self.head_dim)
        kv_shape = (self.batch, self.kv_heads, self.kv_len, self.head_dim)
        shapes = (q_shape, kv_shape, kv_shape)
        q, k, v = (torch.randn(s, generator=draw, device=device).to(self.torch_dtype) for s in shapes)
        return q, k, v


@dataclass(frozen=True)
class Definition:
    """What a contender computes, as arguments of `naive_swat`; its own window decides its useful work."""

    window: WindowLike
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    slopes: Literal["balanced", "alibi"] | None = "balanced"

    def problem(self, case: Case, device: torch.device) -> Problem:
        """Describe the call that it makes of a case."""
        sizes = (case.batch, case.q_heads, case.kv_heads, case.q_len, case.kv_len, case.head_dim, case.head_dim)
        window, has_slopes = Window.of(self.window), self.slopes is not None
        return Problem(*sizes, case.torch_dtype, device, window, self.activation, has_slopes)

    def work(self, case: Case, passes: Passes) -> tuple[float, int]:
        """Count (useful FLOPs, least bytes); what a decoding step need not read does not count."""
        problem = self.problem(case, torch.device("cpu"))
        if self.window is not None:
            left, _ = Window.of(self.window).clamped(1, 2**62)
            problem = replace(problem, kv_len=min(case.kv_len, case.q_len + left))
        flops, moved = problem.flops(), problem.bytes()
        if passes == "both":
            flops, moved = flops + problem.flops(backward=True), moved + problem.bytes(backward=True)
        return flops, moved

    def __str__(self) -> str:
        names: dict[WindowLike, str] = {None: "causal", (None, None): "all keys"}
        seen = names.get(self.window, f"window {self.window}")
        bias = f", {self.slopes} slopes" if self.slopes else ""
        return f"{self.activation}, {seen}{bias}"


def layer(name: str, reason: str, heads: tuple[int, int], length: int, window: int, **more: Any) -> Case:
    """A case of self-attention: `heads` are those of queries and keys."""
    sizes: Any = {"batch": 1, "head_dim": 64, "dtype": "float32", **more}
    q_heads, kv_heads = heads
    return Case(name, reason, q_heads=q_heads, kv_heads=kv_heads, q_len=length, kv_len=length, window=window, **sizes)


CPU = (
    layer("layer", "a small model's layer; the sizes of our bars", (8, 8), 4096, 512),
    layer("grouped", "four query heads share a key head, as most current models do", (8, 2), 2048, 256),
    layer("small window", "the band is narrow: traffic and overhead decide, not multiplication", (8, 8), 4096, 64),
    layer("long document", "32 times the window: where quadratic attention is left behind", (8, 8), 16384, 512),
)
QUICK_CPU = (replace(CPU[0], q_len=2048, kv_len=2048, reason="a small model's layer, halved to be quick"), CPU[1])

GPU = (
    # The paper names lengths and parameters, not heads or the window of its large models: heads of 64 and a window of
    # 1,024 are ours.
    layer("SWAT 340M", "the paper's 340M layer", (16, 16), 4096, 1024, batch=8, dtype="bfloat16"),
    layer("SWAT 760M", "the paper's 760M layer", (24, 24), 4096, 1024, batch=8, dtype="bfloat16"),
    layer("Mistral-7B", "Mistral 7B's layer", (32, 8), 16384, 4096, batch=1, head_dim=128, dtype="bfloat16"),
    layer("gpt-oss", "gpt-oss' windowed layer: many heads, 128 keys", (64, 8), 8192, 128, batch=2, dtype="bfloat16"),
    layer("long document", "131,072 tokens", (16, 4), 131072, 1024, head_dim=128, dtype="bfloat16"),
    layer("small window", "below about 400 keys memory decides", (32, 32), 8192, 64, batch=2, dtype="bfloat16"),
)
QUICK_GPU = (GPU[0], GPU[3])


def step(name: str, reason: str, batch: int, window: int, heads: tuple[int, int] = (32, 8), **more: Any) -> Case:
    """A decoding step: one new token per row after a context longer than the window, so that the ring has wrapped."""
    sizes: Any = {"head_dim": 128, "dtype": "bfloat16", "q_len": 1, "kv_len": window + 37, **more}
    q_heads, kv_heads = heads
    return Case(
        name, reason, batch=batch, q_heads=q_heads, kv_heads=kv_heads, window=window, passes=("forward",), **sizes
    )


DECODE = (
    step("decode batch 64", "a served batch: reading the cache is all the work", 64, 4096),
    step("decode batch 1", "one user: a single row must still fill the device", 1, 4096),
    step("decode small window", "gpt-oss' window: launches decide", 64, 128, (64, 8), head_dim=64),
)
# What a GPU's report races, in this order.
GPU_REPORT = (GPU[0], GPU[2], GPU[3], DECODE[1], DECODE[0])


def pretend(case: Case) -> Case:
    """Shrink a case to what a CPU runs at once, for a dry run."""
    q_len, kv_len = (1, 85) if case.decodes else (300, 300)
    sizes: dict[str, Any] = {"batch": 1, "q_heads": 4, "kv_heads": 2, "head_dim": 16, "window": 48}
    return replace(case, q_len=q_len, kv_len=kv_len, dtype="float32", **sizes)


DECODE_CPU = (
    step("decode batch 8", "a served batch on a CPU", 8, 2048, (8, 2), head_dim=64, dtype="float32"),
    step("decode batch 1", "one user on a CPU", 1, 2048, (8, 2), head_dim=64, dtype="float32"),
)


def scaling(device: str, quick: bool) -> tuple[Case, ...]:
    """Lengths to 65,536, windows, heads: each varied alone around one layer."""
    dtype, batch = ("float32", 1) if device == "cpu" else ("bfloat16", 4)
    lengths = (1024, 4096, 16384, 65536) if quick else (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    windows = (64, 512) if quick else (32, 64, 128, 256, 512, 1024, 2048)
    heads = (2, 8) if quick else (1, 2, 4, 8, 16)
    why = "cost against {}: the others fixed"
    options: dict[str, Any] = {"batch": batch, "dtype": dtype}
    return (
        *(layer(f"length {n:,}", why.format("length"), (8, 8), n, 512, axis="length", **options) for n in lengths),
        *(layer(f"window {n:,}", why.format("window"), (8, 8), 4096, n, axis="window", **options) for n in windows),
        *(layer(f"heads {n}", why.format("heads"), (n, n), 4096, 512, axis="heads", **options) for n in heads),
    )


# What the kernels of a CPU are held to, beside the cases above.
BARS = {
    "wide heads": layer("wide heads", "heads as most large models have them", (8, 8), 4096, 512, head_dim=128),
    "odd heads": layer("odd heads", "a head and a window of no power of two", (8, 8), 4096, 300, head_dim=80),
    "odd shape": layer("odd shape", "nothing fits a tile", (5, 1), 1531, 97, batch=3, head_dim=48),
    "16 bits": replace(CPU[0], name="16 bits", reason="conversion on the way in and out", dtype="bfloat16"),
    "long": replace(CPU[0], name="long", reason="eight times the tokens of the layer", q_len=32768, kv_len=32768),
    "step": step(
        "step", "one user of a large model on a CPU: reading the cache is all the work", 1, 4096, dtype="float32"
    ),
}
