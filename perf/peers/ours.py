"""SWAT by this library: its definition, its backends by name, and its decoding step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from perf.cases import Case, Definition, Passes
from perf.peers.peer import Peer, Run, dense_limit
from swat_flex import RingCache, dispatch, explain, flex_swat, naive_swat, swat_decode, tuned
from swat_flex.decode.attend import DecodeBackend
from swat_flex.problem import Backend


class Ours(Peer):
    """A contender that computes SWAT."""

    ours = True

    def definition(self, case: Case) -> Definition:
        return Definition(case.window)


class Naive(Ours):
    """The definition, written down as it reads."""

    name = "naive"

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        return dense_limit(case, device, 4 if passes == "forward" else 8)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        return lambda: naive_swat(q, k, v, case.window)


class Swat(Ours):
    """`flex_swat` by one backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend: Backend = backend
        self.name = f"swat {backend}"

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        problem = replace(self.definition(case).problem(case, device), needs_grad=passes == "both")
        return dispatch.BACKENDS[self.backend].supports(problem)

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        return lambda: flex_swat(q, k, v, case.window, backend=self.backend)

    def configured(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[str, str]:
        found = explain(q, k, v, case.window, backend=self.backend).configuration
        configuration = ", ".join(f"{x.tunable}: {x.configuration}" for x in found) or "none"
        return configuration, ", ".join(dict.fromkeys(x.origin for x in found)) or "default"


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

    def configured(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[str, str]:
        settings = self._settings(case, q.device)
        return "; ".join(f"{name}: {config}" for name, config in settings.items()), "asked for"

    def _settings(self, case: Case, device: torch.device) -> dict[str, Any]:
        problem = self.definition(case).problem(case, device)
        tunables = dispatch.BACKENDS["triton"].tunables(problem)
        chosen = [t for t in tunables if t.name.partition(".")[2] in self.kernels]
        return {tunable.name: replace(tunable.default(problem), **self.changes) for tunable in chosen}


class SwatDecode(Ours):
    """`swat_decode` over a ring that holds the last `window` keys; filling it is no part of a step."""

    copies = True

    def __init__(self, backend: DecodeBackend = "auto") -> None:
        self.backend: DecodeBackend = backend
        self.name = "swat_decode" if backend == "auto" else f"swat_decode {backend}"

    def supports(self, case: Case, device: torch.device, passes: Passes) -> str | None:
        if passes == "both":
            return "a cache keeps numbers alone: no gradients"
        return None if case.q_len <= 16 else f"decodes at most 16 new tokens at once, not {case.q_len}"

    def prepare(self, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Run:
        sizes = (case.batch, case.kv_heads, case.window, case.head_dim)
        cache = RingCache(*sizes, dtype=q.dtype, device=q.device, queries=case.q_len)
        cache.append(k, v)
        return lambda: swat_decode(q, cache, backend=self.backend)
