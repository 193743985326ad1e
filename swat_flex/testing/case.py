"""`SwatCase`: one call of `flex_swat` as numbers and words. Its tensors follow from a seed, so it fits into a line."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from swat_flex import validation
from swat_flex.api import explain, flex_swat
from swat_flex.problem import Backend, WindowLike
from swat_flex.testing.budget import overflows, with_gradients
from swat_flex.testing.ring import decoded
from swat_flex.testing.shards import sharded
from swat_flex.testing.truth import Arithmetic, Truth, truth_of

SCHEMA = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS = ("contiguous", "transposed", "expanded heads", "expanded batch", "sliced", "columns")
DOCUMENTS = ("none", "packed", "padded", "anyhow", "one row", "late")
SLOPES = ("balanced", "none", "alibi", "tensor")
BIASES = ("none", "number", "tensor")
Kind = Literal["usual", "decode", "shards", "tails", "long"]  # of cases that are drawn together: `strategies.cases_for`


@dataclass(frozen=True, slots=True, repr=False)
class SwatCase:
    """A call on q `[batch, group·kv_heads, length − fewer, head_dim]`, k and v `[batch, kv_heads, length, ·]`.

    Attributes:
        length: keys; fewer: how many of them have no query.
        layouts: memory layouts of q, k, v and the output's gradient, each one of `LAYOUTS`.
        documents: "packed" runs, "padded" at either end, "anyhow" in any order, "one row" of ids for all batches,
            "late" padded at the left.
        slopes: "tensor" draws ±`steepness` logits per token; logit_bias: one number, or one per head, down to `bias`.
        qk_exponent, v_exponent, grad_exponent: the inputs are normal, times these powers of two.
        ring: not `flex_swat` but `swat_decode` of a `RingCache` for so many new tokens at a time; 0 is `flex_swat`.
        shards: not `flex_swat` but its context-parallel form over so many ranks, simulated; 0 is `flex_swat`.
        seed: of every element.
    """

    length: int
    window: WindowLike
    fewer: int = 0
    batch: int = 1
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 8
    value_dim: int = 8
    dtype: str = "float32"
    layouts: tuple[str, str, str, str] = ("contiguous",) * 4
    documents: str = "none"
    slopes: str = "balanced"
    steepness: float = 0.1
    scale: float | None = None
    logit_bias: str = "none"
    bias: float = -1.1
    activation: str = "sigmoid"
    qk_exponent: int = 0
    v_exponent: int = 0
    grad_exponent: int = 0
    ring: int = 0
    shards: int = 0
    seed: int = 0

    def __repr__(self) -> str:
        """The expression that makes it, without what is as by default."""
        given = (f"{field.name}={x!r}" for field in fields(self) if (x := getattr(self, field.name)) != field.default)
        return f"{type(self).__name__}({', '.join(given)})"

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v."""
        draw = torch.Generator().manual_seed(self.seed)
        q_shape = (self.batch, self.q_heads, self.length - self.fewer, self.head_dim)
        k_shape = (self.batch, self.kv_heads, self.length, self.head_dim)
        q = self._tensor(q_shape, self.layouts[0], self.qk_exponent, draw)
        k = self._tensor(k_shape, self.layouts[1], self.qk_exponent, draw)
        return q, k, self._tensor((*k_shape[:3], self.value_dim), self.layouts[2], self.v_exponent, draw)

    def gradient(self) -> Tensor:
        """Draw the gradient of the output, `[batch, q_heads, length − fewer, value_dim]`."""
        draw = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, self.q_heads, self.length - self.fewer, self.value_dim)
        return self._tensor(shape, self.layouts[3], self.grad_exponent, draw)

    def _tensor(self, shape: tuple[int, ...], layout: str, exponent: int, draw: torch.Generator) -> Tensor:
        b, h, n, d = shape

        def normal(*size: int) -> Tensor:
            wide = torch.float64 if self.dtype == "float64" else torch.float32
            return torch.randn(size, generator=draw, dtype=wide).mul_(2.0**exponent).to(self.torch_dtype)

        if layout == "transposed":
            return normal(b, n, h, d).transpose(1, 2)
        if layout == "expanded heads":
            return normal(b, 1, n, d).expand(shape)
        if layout == "expanded batch":
            return normal(1, h, n, d).expand(shape)
        if layout == "sliced":
            return normal(b, h + 1, n + 3, 2 * d)[:, 1:, 2:-1, ::2]
        return normal(b, h, d, n).transpose(2, 3) if layout == "columns" else normal(b, h, n, d)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of the call, backend apart."""
        draw = torch.Generator().manual_seed(self.seed + 2)
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        heads = self.q_heads
        slopes: Any = None if self.slopes == "none" else self.slopes
        if slopes == "tensor":
            slopes = (torch.rand(heads, generator=draw, dtype=dtype) * 2 - 1) * self.steepness
        bias: Any = None if self.logit_bias == "none" else self.bias
        if self.logit_bias == "tensor":
            bias = torch.rand(heads, generator=draw, dtype=dtype) * self.bias
        ids = self._document_ids(draw)
        return {"slopes": slopes, "scale": self.scale, "logit_bias": bias, "document_ids": ids,
                "activation": self.activation}  # fmt: skip

    def _document_ids(self, draw: torch.Generator) -> Tensor | None:
        if self.documents == "none":
            return None
        shape = (self.length,) if self.documents == "one row" else (self.batch, self.length)
        if self.documents == "anyhow":
            return torch.randint(-1, 3, shape, generator=draw, dtype=torch.int32)
        if self.documents in ("padded", "late"):
            ends = torch.randint(0, self.length + 1, (self.batch, 1), generator=draw)
            token = torch.arange(self.length)
            late = (torch.arange(self.batch)[:, None] % 2 == 1) & (self.documents == "padded")
            return torch.where(torch.where(late, token >= ends, token < ends), -1, 5)
        starts = torch.rand(shape, generator=draw) < 4 / self.length
        return starts.cumsum(-1)

    def call(
        self,
        backend: Backend,
        device: str = "cpu",
        *,
        gradients: bool = True,
        inputs: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """`flex_swat`'s output and, with `gradients`, that of every differentiable input by name; on the CPU.

        `inputs` take the place of q, k and v.
        """
        own, grad, options = drawn(self)
        q, k, v = (on_device(x, device) for x in inputs or own)
        options = {name: on_device(x, device) for name, x in options.items()}
        if self.ring:
            assert isinstance(self.window, int)
            with torch.no_grad():
                return {"out": decoded((q, k, v), self.window, self.ring, self.seed, backend, options).cpu()}
        swat = functools.partial(sharded, ranks=self.shards, seed=self.seed) if self.shards else flex_swat
        if not gradients:
            with torch.no_grad():
                return {"out": swat(q, k, v, self.window, backend=backend, **options).cpu()}
        grad = on_device(grad, device)
        results = with_gradients(swat, (q, k, v), self.window, grad, backend=backend, **options)
        return {name: x.cpu() for name, x in results.items()}

    def refusal(self, backend: Backend, device: str = "cpu", *, gradients: bool = True) -> str | None:
        """Say why the backend does not run this case, or return None."""
        q, k, v = (on_device(x, device).requires_grad_(gradients) for x in self.tensors())
        options = {name: on_device(x, device) for name, x in self.options().items()}
        try:
            explain(q, k, v, self.window, backend=backend, **options)
        except NotImplementedError as error:
            return str(error)
        return None

    def truth(self, backend: Backend = "naive", device: str = "cpu", *, gradients: bool = True) -> Truth:
        """The exact results, and what the backend's arithmetic may lose."""
        (q, k, v), grad, options = drawn(self)
        operands = validation.resolve(q, k, v, self.window, **options, backend="naive")
        learnt = tuple(f"d{name}" for name in ("slopes", "logit_bias") if isinstance(options[name], Tensor))
        return truth_of(operands, grad if gradients else None, Arithmetic.of(backend, device, self.torch_dtype), learnt)

    def in_range(self, exact: dict[str, Tensor]) -> bool:
        """Tell whether every exact result fits the dtype it is returned in."""
        per_head = torch.float64 if self.dtype == "float64" else torch.float32
        dtypes = {name: per_head if name in ("dslopes", "dlogit_bias") else self.torch_dtype for name in exact}
        return not any(overflows(x, dtypes[name]) for name, x in exact.items())

    def to_json(self) -> dict[str, Any]:
        """A dictionary that JSON keeps as it is."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, record: Any) -> SwatCase:
        """The case that `to_json` wrote; ValueError names what does not fit."""
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            got = record.get("schema") if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"case: expected schema {SCHEMA}, got {got}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(record.keys() - known - {"schema"}):
            raise ValueError(f"case: expected the fields of SwatCase, got {', '.join(unknown)}")
        values: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in record.items() if name != "schema"
        }
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"case: expected the fields of SwatCase, got {error}") from error


@functools.lru_cache(maxsize=2)
def drawn(case: SwatCase) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, dict[str, Any]]:
    """(q, k, v), the output's gradient and the options of a case, once for all that ask; not to be written."""
    return case.tensors(), case.gradient(), case.options()


def copied(x: Tensor) -> Tensor:
    """A copy of the same strides on memory of its own, of which an expanded tensor's part is written once."""
    copy = torch.empty(0, dtype=x.dtype)
    storage: Any = x.untyped_storage()
    return copy.set_(storage.clone(), x.storage_offset(), x.shape, x.stride())


def on_device(x: Any, device: str) -> Any:
    """A tensor on the device with its strides, those of expanded axes too; anything else as it is."""
    if not isinstance(x, Tensor) or device == "cpu":
        return x
    if x.numel() == 0:
        return x.to(device)
    size = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
    return x.as_strided((size,), (1,)).to(device).as_strided(x.shape, x.stride())


def once(x: Tensor) -> Tensor:
    """The part of an expanded tensor that its memory holds once, which may be written."""
    return x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())]


def largest_exponent(case_dtype: str, terms: int) -> int:
    """Return the exponent of values whose sum over `terms` of them stays just below the dtype's largest number."""
    return int(math.log2(torch.finfo(DTYPES[case_dtype]).max)) - 3 - max(terms, 1).bit_length()
