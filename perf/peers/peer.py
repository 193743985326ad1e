"""What every contender offers, so that one harness checks and times them all."""

from __future__ import annotations

import importlib
import importlib.util
import textwrap
from collections.abc import Callable

import torch
from torch import Tensor

from perf.cases import Case, Definition, Passes

Run = Callable[[], Tensor]  # one forward on tensors bound before: `[B, Hq, Lq, D]`


class Peer:
    """A contender. Adapters translate our window, `0 ≤ i − j < window`, into their own convention.

    Attributes:
        name: in tables.
        ours: whether it is SWAT by this library, held to the whole error budget.
        package: what must be importable, empty for torch alone.
        tokens_first: it wants `[B, L, H, D]` in memory; it is given views `[B, H, L, D]` of such tensors, so that no
            copy is part of its time.
        cuda: it runs on CUDA alone.
        copies: its run holds copies of the keys and values made by `prepare`.
    """

    name: str
    ours = False
    package = ""
    tokens_first = False
    cuda = False
    copies = False

    def available(self, device: torch.device) -> str | None:
        """Say why it cannot run here at all, or return None."""
        if self.package and importlib.util.find_spec(self.package.partition(".")[0]) is None:
            return "not installed"
        if self.cuda and device.type != "cuda":
            return f"needs a CUDA device, not {device.type}"
        try:
            importlib.import_module(self.package or "torch")
        except Exception as error:  # whatever a package does on import is its reason, never the run's end
            return f"import fails: {one_line(error)}"
        return None

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        """Say why it cannot run this case, or return None."""
        return None

    def definition(self, case: Case) -> Definition:
        """What it computes: by default a softmax over the window. It is checked against this before it is timed."""
        return Definition(case.window, "softmax", None)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        """Bind q `[B, Hq, Lq, D]`, k and v `[B, Hkv, Lk, D]`; masks and compilations are made here, unmeasured.

        The run is differentiable in q, k and v where `supports` promised "both".
        """
        raise NotImplementedError

    def configured(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[str, str]:
        """What the run will use, and where that came from."""
        return "", ""


def needs_half(case: Case) -> str | None:
    """The reason of a peer of low-precision kernels."""
    return None if case.dtype in ("bfloat16", "float16") else f"has no {case.dtype} kernel"


def needs_self_attention(case: Case) -> str | None:
    """The reason of a peer whose first query and first key share a position."""
    return None if case.q_len == case.kv_len else "aligns the first query with the first key, not the last"


def needs_equal_heads(case: Case) -> str | None:
    """The reason of a peer without grouped queries."""
    return None if case.q_heads == case.kv_heads else "has no grouped queries"


def dense_limit(case: Case, device: torch.device, matrices: int) -> str | None:
    """The reason of a peer that holds `matrices` of the size B·Hq·Lq·Lk: too large, or too slow for a CPU."""
    size = matrices * case.batch * case.q_heads * case.q_len * case.kv_len * case.torch_dtype.itemsize
    free = 2**32 if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory // 4
    return f"its dense matrices take {size / 2**30:.0f} GiB" if size > free else None


def slow_limit(case: Case, device: torch.device, definition: Definition) -> str | None:
    """The reason of a peer that would take minutes on a CPU."""
    flops, _ = definition.work(case, "forward")
    return f"{flops / 1e12:.1f} TFLOP take a CPU too long" if device.type == "cpu" and flops > 4e11 else None


def one_line(error: Exception) -> str:
    """An exception as a reason in a table."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
