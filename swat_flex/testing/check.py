"""`check`: one case on one backend against the definition. Raises AssertionError with what was wrong."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from swat_flex.api import flex_swat
from swat_flex.problem import Backend
from swat_flex.testing.bound import rounding_bound
from swat_flex.testing.budget import ENOUGH, measure
from swat_flex.testing.case import SwatCase, on_device
from swat_flex.window import Window

# How much of the budget may be used. In float32 the rule compares two evaluations in one precision, and logits far from
# 0 make their ratio a matter of the order of operations: banded and triton reach 1.4 there. A fault is far above 2.
LIMITS = {torch.float32: 2.0, torch.bfloat16: 1.0, torch.float16: 1.0}
# A rule on two random errors is judged on many: what one draw breaks must be broken by this many draws stacked. The
# elements of a row share the error of their logits, so that one draw may hold few errors in many elements.
REDRAWS = (8, 64)
CLEAR = 10.0  # times the limit: no chance


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a case used of its budget at most, and by which tensor; `excluded` where its exact result overflows."""

    use: float = 0.0
    name: str = ""
    excluded: bool = False


def check(case: SwatCase, backend: Backend, device: str = "cpu") -> Verdict:
    """Output, every gradient, zero rows, and that a key which a row does not see changes none of its bits.

    Each tensor is held to the budget rule (`swat_flex.testing.budget`), small ones to `rounding_bound`.

    Raises:
        AssertionError: with the case, the tensor and the element.
    """
    exact = case.exact()
    if not case.in_range(exact):
        return Verdict(excluded=True)
    gradients = trains(backend, device, case.dtype, case.activation)
    actual = case.call(backend, device, gradients=gradients)
    bounds = rounding_bound(case.tensors(), case.window, case.gradient(), exact, **case.options())
    rough: dict[str, Tensor] = {}
    worst = Verdict()
    for name, result in actual.items():
        if has_enough(exact[name]) and result.dtype != torch.float64 and not rough:
            rough = case.rough()
        use = _use(case, backend, device, name, result, exact[name], rough.get(name), bounds[name])
        worst = max(worst, Verdict(use, name), key=lambda verdict: verdict.use)
    _check_unseen(case, backend, device, actual)
    return worst


def has_enough(exact: Tensor) -> bool:
    """Tell whether the tensor has enough different elements for the statistical rule."""
    return exact.numel() >= ENOUGH and torch.unique(exact[exact != 0]).numel() >= ENOUGH


@functools.cache
def trains(backend: Backend, device: str, dtype: str, activation: str) -> bool:
    """Tell whether the backend has gradients for such calls."""
    return SwatCase(1, 1, dtype=dtype, activation=activation).refusal(backend, device) is None


def _use(
    case: SwatCase, backend: Backend, device: str, name: str, actual: Tensor, exact: Tensor, rough: Tensor | None,
    bound: Tensor,
) -> float:  # fmt: skip
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: expected shape {list(exact.shape)}, got {list(actual.shape)}\n{case}")
    error = (actual.double() - exact).abs().nan_to_num(nan=float("inf"))
    shares = error / bound
    if rough is None or not has_enough(exact) or not rough.isfinite().all():
        use = float(shares.max()) if shares.numel() else 0.0
        if not use <= 1:
            raise AssertionError(_element(case, backend, name, shares, actual, exact, bound))
        return use
    limit = LIMITS[actual.dtype]
    budget = measure(actual, exact, rough, name=name, window=case.window)
    draws = 1
    for more in REDRAWS:
        if budget.use <= limit or budget.use > CLEAR * limit:
            break
        draws = more
        budget = measure(*_redrawn(case, backend, device, name, draws), name=name, window=case.window)
    if not budget.use <= limit:
        raise AssertionError(f"{budget}\nbackend {backend}, {draws} draws of {case}")
    return budget.use


def _element(
    case: SwatCase, backend: Backend, name: str, shares: Tensor, actual: Tensor, exact: Tensor, bound: Tensor
) -> str:
    worst = int(shares.argmax())
    place = [int(n) for n in torch.unravel_index(torch.tensor(worst), shares.shape)]
    got, right, allowed = (float(x.flatten()[worst]) for x in (actual, exact, bound))
    return (
        f"{name}: element {place} is {got:.9g}, exact {right:.9g}, error {abs(got - right):.3g} "
        f"of {allowed:.3g} allowed\nbackend {backend}, {case}"
    )


def _redrawn(case: SwatCase, backend: Backend, device: str, name: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(actual, exact, rough) of one tensor over several draws of the case, stacked."""
    draws = [dataclasses.replace(case, seed=case.seed + 1000 * n) for n in range(count)]
    gradients = trains(backend, device, case.dtype, case.activation)
    results = [(c.call(backend, device, gradients=gradients), c.exact(), c.rough()) for c in draws]
    actual, exact, rough = (torch.stack([r[i][name] for r in results]) for i in range(3))
    return actual, exact, rough


def _check_unseen(case: SwatCase, backend: Backend, device: str, actual: dict[str, Tensor]) -> None:
    """Rows that see nothing are zero; a NaN key, and another value, leave the rows that do not see them as they are."""
    q, k, v = case.tensors()
    options = case.options()
    seen = _visible(case, options["document_ids"])  # [B, Lq, Lk]
    blind = ~seen.any(-1)[:, None, :, None]
    for name in ("out", "dq"):
        if name in actual and (actual[name].masked_select(blind) != 0).any():
            raise AssertionError(f"{name}: a row that sees no key is not zero\nbackend {backend}, {case}")
    j = case.seed % case.length
    unseen = ~seen[:, :, j]
    if not unseen.any():
        return
    _once(k)[:, :, j] = (float("nan"), float("inf"), -1e4, 3e4)[case.seed // 8 % 4]
    _once(v)[:, :, j] *= -0.5
    q, k, v = (on_device(x, device) for x in (q, k, v))
    options = {name: on_device(x, device) for name, x in options.items()}
    with torch.no_grad():
        out = flex_swat(q, k, v, case.window, backend=backend, **options).cpu()
    rows = unseen[:, None, :, None].expand_as(out)
    if not torch.equal(out[rows], actual["out"][rows]):
        raise AssertionError(f"out: key or value {j} reached a row that does not see it\nbackend {backend}, {case}")


def _once(x: Tensor) -> Tensor:
    """The part of an expanded tensor that its memory holds once, which may be written."""
    return x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())]


def _visible(case: SwatCase, document_ids: Tensor | None) -> Tensor:
    """Bool `[B, Lq, Lk]`."""
    i, j = torch.arange(case.fewer, case.length)[:, None], torch.arange(case.length)
    seen = Window.of(case.window).sees(i - j).expand(case.batch, -1, -1)
    if document_ids is None:
        return seen
    ids = document_ids.expand(case.batch, case.length)
    own = ids[:, case.fewer :, None]
    return seen & (own == ids[:, None, :]) & (own >= 0)
