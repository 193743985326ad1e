"""Calls of the backend whose compiled kernels run on the CPU, and what their results are held to."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from swat_flex import flex_swat, naive_swat
from swat_flex.inspection import emulated

# Relative error (2-norm) of a result: half a unit in the last place, which rounding the result alone can cost; in
# float32, where sums of a few hundred terms round too, sixteen times that.
LIMITS = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.bfloat16, torch.float16)}
LIMITS[torch.float32] = 16 * torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class Call:
    """A call with random inputs; slopes are small enough for the far edge of the window to count."""

    length: int = 300
    window: Any = 100
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    heads: int = 2
    kv_heads: int = 1
    batch: int = 1
    fewer: int = 0
    slopes: bool = True
    bias: bool = True
    documents: bool = False
    activation: str = "sigmoid"
    per_head: bool = False

    def inputs(self):
        """{name: tensor} of what is differentiated, and the output's gradient."""
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(self.dtype)

        queries = self.length - self.fewer
        found = {
            "q": draw(self.batch, self.heads, queries, self.head_dim),
            "k": draw(self.batch, self.kv_heads, self.length, self.head_dim),
            "v": draw(self.batch, self.kv_heads, self.length, self.head_dim),
            "grad": draw(self.batch, self.heads, queries, self.head_dim),
        }
        steepest = 2 / self.length
        if self.slopes:
            found["slopes"] = -torch.rand(self.heads, generator=generator) * steepest
        if self.bias:
            found["logit_bias"] = torch.randn(self.heads, generator=generator)
        return found

    def output(self, function, given, **options):
        """What a function of this call returns."""
        ids = None
        if self.documents:
            ids = (torch.arange(self.length).expand(self.batch, -1) // 60 - 1).to(torch.int32)
        return function(
            given["q"], given["k"], given["v"], self.window, slopes=given.get("slopes"),
            logit_bias=given.get("logit_bias"), document_ids=ids, activation=self.activation, **options,
        )  # fmt: skip

    def apply(self, function, inputs, **options):
        """{name: result} of a function of this call: the output and the gradients."""
        names = [name for name in inputs if name != "grad" and (self.per_head or name in "qkv")]
        given = {name: x.clone().requires_grad_(name in names) for name, x in inputs.items()}
        out = self.output(function, given, **options)
        gradients = torch.autograd.grad(out, [given[name] for name in names], inputs["grad"])
        return {"out": out.detach()} | {f"d{name}": x for name, x in zip(names, gradients, strict=True)}

    def exact(self):
        """The definition in float64."""
        call = replace(self, activation="sigmoid")  # of which the hardware's tanh is an approximation
        return call.apply(naive_swat, {name: x.double() for name, x in self.inputs().items()})

    def execute(self, target, inputs=None):
        """(results, launches by kernel) of the compiled kernels, whose outputs start as NaN."""
        torch.utils.deterministic.fill_uninitialized_memory = True
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
        try:
            with emulated(target) as ran:
                found = self.apply(flex_swat, self.inputs() if inputs is None else inputs, backend="triton")
        finally:
            torch.use_deterministic_algorithms(before)
        return found, {launched.name: launched for launched in ran}


def relative(found, exact):
    """Error of a tensor, and of its worst row, which may be small: rows are held to the largest tenth of all.

    Where no query sees a key, exact is 0 and any error infinitely large.
    """
    exact = exact.detach()
    error, least = found.double() - exact, torch.finfo(torch.float64).tiny
    norms = exact.norm(dim=-1)
    rows = error.norm(dim=-1) / norms.clamp_min(max(float(norms.max()) / 10, least))
    return float(error.norm() / exact.norm().clamp_min(least)), float(rows.max())


def assert_near(found, exact, dtype):
    """Hold every result to the limit of its dtype, and each row to four times that."""
    for name, x in exact.items():
        assert found[name].isfinite().all(), name
        whole, row = relative(found[name], x)
        print(f"{name}: relative error {whole:.2e}, worst row {row:.2e}")
        assert whole < LIMITS[dtype], name
        assert row < 4 * LIMITS[dtype], name


WRITTEN = {"forward_kernel": ["out"], "query_gradient_kernel": ["dq"], "key_gradients_kernel": ["dk", "dv"]}


def assert_written_once(launches):
    """Hold every element of every output to one write, and every input to none."""
    for kernel, launched in launches.items():
        for name, writes in launched.execution.writes.items():
            if name != "partial":
                assert (writes == (name in WRITTEN[kernel])).all(), (kernel, name)
        assert not launched.execution.undefined
