"""SWAT by this library: its definition, its backends by name, and its decoding step."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from perf.cases import Case, Definition, Passes
from perf.peers.peer import Configured, Peer, Run, dense_limit
from swat_flex import dispatch, explain, flex_swat, naive_swat, tuned
from swat_flex.problem import Backend


class Naive(Peer):
    """The definition, written down as it reads."""

    name = "naive"
    ours = True

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        return dense_limit(case, device, 4 if passes == "forward" else 8)

    def definition(self, case: Case) -> Definition:
        return Definition(case.window)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        return lambda: naive_swat(q, k, v, case.window)


class Swat(Peer):
    """`flex_swat` by one backend."""

    ours = True

    def __init__(self, backend: Backend) -> None:
        self.backend: Backend = backend
        self.name = f"swat {backend}"

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        problem = replace(self.definition(case).problem(case, device), needs_grad=passes == "both")
        return dispatch.BACKENDS[self.backend].supports(problem)

    def definition(self, case: Case) -> Definition:
        return Definition(case.window)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        return lambda: flex_swat(q, k, v, case.window, backend=self.backend)

    def configured(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Configured:
        found = explain(q, k, v, case.window, backend=self.backend)
        configured = found.configuration
        return Configured(
            ", ".join(f"{x.tunable}: {x.configuration}" for x in configured) or "none",
            ", ".join(dict.fromkeys(x.origin for x in configured)) or "default",
        )


class TritonVariant(Swat):
    """The triton backend with its defaults changed in some of its kernels."""

    def __init__(self, label: str, kernels: tuple[str, ...], **changes: Any) -> None:
        super().__init__("triton")
        self.name = f"swat triton, {label}"
        self.kernels, self.changes = kernels, changes

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        if passes == "forward" and "forward" not in self.kernels:
            return "its forward is that of swat triton"
        return super().supports(case, device, passes)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        run, settings = super().prepare(case, q, k, v), self._settings(case, q.device)

        def forced() -> Tensor:
            with tuned.using(settings):
                return run()

        return forced

    def configured(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Configured:
        settings = self._settings(case, q.device)
        return Configured("; ".join(f"{name}: {config}" for name, config in settings.items()), "asked for")

    def _settings(self, case: Case, device: torch.device) -> dict[str, Any]:
        problem = self.definition(case).problem(case, device)
        tunables = dispatch.BACKENDS["triton"].tunables(problem)
        chosen = [t for t in tunables if t.name.partition(".")[2] in self.kernels]
        return {tunable.name: replace(tunable.default(problem), **self.changes) for tunable in chosen}


class SwatDecode(Peer):
    """`swat_decode` over a ring that holds the last `window` keys; filling it is no part of a step."""

    ours = True
    copies = True
    package = "swat_flex.decode"

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend
        self.name = "swat_decode" if backend == "auto" else f"swat_decode {backend}"

    def available(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("swat_flex.decode") is None:
            return "this version of swat_flex has no swat_decode"
        return None

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        if passes == "both":
            return "a cache keeps numbers alone: no gradients"
        return None if case.q_len <= 16 else f"decodes at most 16 new tokens at once, not {case.q_len}"

    def definition(self, case: Case) -> Definition:
        return Definition(case.window)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        decode = importlib.import_module("swat_flex.decode")
        cache = decode.RingCache(
            case.batch, case.kv_heads, case.window, case.head_dim, dtype=q.dtype, device=q.device, queries=case.q_len
        )
        cache.append(k, v)
        return lambda: decode.swat_decode(q, cache, backend=self.backend)
