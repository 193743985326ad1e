"""`check`: one case on one backend against the definition. Raises AssertionError with what was wrong.

Two rules:

- No element is further from the exact result than rounding explains: `truth_of`, a theorem.
- The rows of a float32 or float64 output whose weights stay below ½ are not all too large, or all too small: with ρ_r
  the sum of a row's errors, in the direction of the exact values, as a share of what is allowed,
  |Σ ρ_r| ≤ `LIMIT`·√(Σ ρ_r²) + what all rows may gain together. Rows whose errors are independent and as often up as
  down exceed that with a chance of 2·e^(−LIMIT²/2), whatever the errors' sizes (Hoeffding, given |ρ_r|): 5·10⁻¹¹,
  5·10⁻⁵ per million cases.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from swat_flex.problem import Backend
from swat_flex.testing.case import SwatCase, copied, drawn, once
from swat_flex.testing.truth import Truth
from swat_flex.window import Window

LIMIT = 7.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a case used of what is allowed at most, and by which tensor; `excluded` where its exact result overflows.

    use: of the element rule; trend: of the rows' rule.
    """

    use: float = 0.0
    name: str = ""
    trend: float = 0.0
    excluded: bool = False


def check(case: SwatCase, backend: Backend, device: str = "cpu") -> Verdict:
    """Output, every gradient, zero rows, and that a key which a row does not see changes none of its bits.

    Raises:
        AssertionError: with the case, the tensor and the element.
    """
    gradients = not case.ring and trains(backend, device, case.dtype, case.activation)
    truth = case.truth(backend, device, gradients=gradients)
    if not case.in_range(truth.exact):
        return Verdict(excluded=True)
    actual = case.call(backend, device, gradients=gradients)
    try:
        # axes along which some input repeats
        shared = tuple(axis for axis, name in ((0, "expanded batch"), (1, "expanded heads")) if name in case.layouts)
        verdict = hold(truth, actual, shared)
        seen = visible(case)
        _check_blind(seen, actual)
        if case.seed // 64 % 2:  # every other case: it costs as much as the call
            _check_unseen(case, backend, device, seen, actual)
    except AssertionError as error:
        raise AssertionError(f"{error}\nbackend {backend}, {case}") from None
    return verdict


@functools.cache
def trains(backend: Backend, device: str, dtype: str, activation: str) -> bool:
    """Tell whether the backend has gradients for such calls."""
    return SwatCase(1, 1, dtype=dtype, activation=activation).refusal(backend, device) is None


def hold(truth: Truth, actual: dict[str, Tensor], shared: tuple[int, ...] = ()) -> Verdict:
    """Hold results against both rules; AssertionError says which element or tensor breaks which.

    Args:
        shared: axes of a result `[B, H, L, D]` along which errors may be copies of one another, beside the last.
    """
    worst = Verdict()
    trend = 0.0
    for name, result in actual.items():
        if result.shape != truth.exact[name].shape:
            raise AssertionError(f"{name}: expected shape {list(truth.exact[name].shape)}, got {list(result.shape)}")
        if result.numel() == 0:
            continue
        error = truth.error(name, result)
        shares = error.abs() / truth.allowed[name]
        use = float(shares.max())
        if not use <= 1:
            raise AssertionError(_element(name, shares, result, truth))
        worst = max(worst, Verdict(use, name), key=lambda verdict: verdict.use)
        if name == "out" and truth.trend is not None:
            trend, text = _trend(error, truth.trend, truth, shared)
            if not trend <= 1:
                raise AssertionError(text)
    return Verdict(worst.use, worst.name, trend)


def _trend(error: Tensor, drift: Tensor, truth: Truth, shared: tuple[int, ...]) -> tuple[float, str]:
    """The share of the rows' rule that is used, and the rule in numbers."""
    axes = (*shared, 3)
    kept = drift < float("inf")
    own = (x.masked_fill(~kept, 0).sum(axes) for x in (truth.allowed["out"], error * truth.exact["out"].sign(), drift))
    of_rows = kept.sum(axes) > 0
    size, rows, gains = (x[of_rows] for x in own)
    rows, gain = rows / size, (gains / size).sum()
    total, spread = float(rows.sum()), float(rows.square().sum().sqrt())
    allowed = LIMIT * spread + float(gain)
    text = (
        f"out: {rows.numel()} rows are too {'large' if total > 0 else 'small'} together: {abs(total):.3g} of "
        f"{allowed:.3g} allowed, {LIMIT:g} times {spread:.3g} of chance and {float(gain):.3g} that all may share"
    )
    return (abs(total) / allowed if allowed > 0 else 0.0), text


def _element(name: str, shares: Tensor, actual: Tensor, truth: Truth) -> str:
    worst = int(shares.argmax())
    place = [int(n) for n in torch.unravel_index(torch.tensor(worst), shares.shape)]
    got, right, allowed = (float(x.flatten()[worst]) for x in (actual, truth.exact[name], truth.allowed[name]))
    error = float(truth.error(name, actual).flatten()[worst])
    return f"{name}: element {place} is {got:.9g}, exact {right:.9g}, error {abs(error):.3g} of {allowed:.3g} allowed"


def _check_blind(seen: Tensor, actual: dict[str, Tensor]) -> None:
    """Rows that see nothing are zero, and so are the gradients of keys that nobody sees."""
    for name in actual.keys() & {"out", "dq", "dk", "dv"}:
        blind = ~seen.any(-1 if name in ("out", "dq") else -2)[:, None, :, None]
        if (actual[name].masked_select(blind) != 0).any():
            raise AssertionError(f"{name}: a row without a visible pair is not zero")


def _check_unseen(case: SwatCase, backend: Backend, device: str, seen: Tensor, before: dict[str, Tensor]) -> None:
    """Key j, NaN and infinity included, and its value changed: no bit changes where j is not seen.

    That is the rows that do not see it, of dq where the key is finite, and dk and dv of all other keys: of a softmax
    those that no row sees together with j.
    """
    j = case.seed % case.length
    meets = seen[:, :, j]  # [B, Lq]
    together = meets if case.activation == "softmax" else torch.zeros_like(meets)
    touched = (together[:, :, None] & seen).any(1)  # [B, Lk]
    touched[:, j] = True
    if meets.all() and touched.all():
        return
    q, k, v = drawn(case)[0]
    k, v = copied(k), copied(v)
    key = (float("nan"), float("inf"), -1e4, 3e4)[case.seed // 8 % 4]
    once(k)[:, :, j] = key
    once(v)[:, :, j] *= -0.5
    after = case.call(backend, device, gradients=len(before) > 1, inputs=(q, k, v))
    for name in before.keys() & {"out", "dq", "dk", "dv"}:
        if name == "out" or (name == "dq" and abs(key) < 1e30):
            kept = ~meets
        elif name in ("dk", "dv"):
            kept = ~touched
        else:
            continue
        rows = kept[:, None, :, None].expand_as(before[name])
        if not torch.equal(after[name][rows], before[name][rows]):
            raise AssertionError(f"{name}: key or value {j}, made {key}, reached a row that does not see it")


def visible(case: SwatCase) -> Tensor:
    """Bool `[B, Lq, Lk]`."""
    i, j = torch.arange(case.fewer, case.length)[:, None], torch.arange(case.length)
    seen = Window.of(case.window).sees(i - j).expand(case.batch, -1, -1)
    ids = drawn(case)[2]["document_ids"]
    if ids is None:
        return seen
    ids = ids.expand(case.batch, case.length)
    own = ids[:, case.fewer :, None]
    same: Tensor = (own == ids[:, None, :]) & (own >= 0)
    return seen & same
