"""Inputs for numeric tests: a case is sizes, options and a seed; its tensors follow from them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swat_flex.testing.budget import exact_results, overflows, rough_swat, with_gradients

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One call of `flex_swat`. `length` counts keys, `fewer` the keys that have no query."""

    length: int = 129
    window: Any = 64
    group: int = 1
    head_dim: int = 64
    value_dim: int | None = None
    dtype: str = "float32"
    layout: str = "contiguous"
    documents: str = "none"
    fewer: int = 0
    activation: str = "sigmoid"
    biased: bool = False
    batch: int = 1
    kv_heads: int = 2
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        draw = torch.Generator().manual_seed(self.seed)
        dv = self.head_dim if self.value_dim is None else self.value_dim
        q_heads = self.group * self.kv_heads
        q = self._lay_out(q_heads, self.length - self.fewer, self.head_dim, draw)
        k = self._lay_out(self.kv_heads, self.length, self.head_dim, draw)
        v = self._lay_out(self.kv_heads, self.length, dv, draw)
        return q, k, v

    def _lay_out(self, heads: int, length: int, dim: int, draw: torch.Generator) -> Tensor:
        """`[batch, heads, length, dim]`, normal values rounded to the dtype, in memory as `layout` says."""
        dtype = DTYPES[self.dtype]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        if self.layout == "transposed":
            return normal(self.batch, length, heads, dim).transpose(1, 2)
        if self.layout == "expanded":
            return normal(1, 1, length, dim).expand(self.batch, heads, length, dim)
        if self.layout == "sliced":
            return normal(self.batch, heads + 1, length + 3, 2 * dim)[:, 1:, 2:-1, ::2]
        return normal(self.batch, heads, length, dim)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call; slopes of both signs, small enough for any length."""
        draw = torch.Generator().manual_seed(self.seed + 1)
        heads = self.group * self.kv_heads
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        slopes = (torch.rand(heads, generator=draw, dtype=dtype) - 0.6) * (4 / max(self.length, 16))
        options: dict[str, Any] = {"slopes": slopes, "activation": self.activation}
        if self.biased:
            options["logit_bias"] = torch.randn(heads, generator=draw, dtype=dtype) - 1
        if self.documents == "packed":
            options["document_ids"] = torch.arange(self.length) // max(self.length // 3, 1)
        elif self.documents == "padded":
            ids = torch.zeros(self.batch, self.length, dtype=torch.int32)
            ids[-1, : self.length // 4] = -1
            ids[0, self.length - self.length // 5 :] = -1
            options["document_ids"] = ids
        return options

    def resolved_window(self) -> Any:
        return {"L": self.length, "L+5": self.length + 5}.get(self.window, self.window)

    def gradient(self) -> Tensor:
        """The output's gradient."""
        q, _, v = self.tensors()
        draw = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn((*q.shape[:3], v.shape[3]), generator=draw, dtype=torch.float64).to(q.dtype)

    def run(self, function: Any, **more: Any) -> dict[str, Tensor]:
        return with_gradients(
            function, self.tensors(), self.resolved_window(), self.gradient(), **self.options(), **more
        )

    def exact(self) -> dict[str, Tensor]:
        return exact_results(self.tensors(), self.resolved_window(), self.gradient(), **self.options())

    def rough(self) -> dict[str, Tensor]:
        return self.run(rough_swat)

    def in_range(self, exact: dict[str, Tensor]) -> bool:
        return not any(overflows(x, DTYPES[self.dtype]) for x in exact.values())
