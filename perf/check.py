"""Is a contender right? Asked on the very tensors that it is timed on; no time counts without it.

Sampled rows are compared with the definition in float64: a slice of queries and the keys up to its last one is a call
of its own, because the last query and the last key share a position. For gradients the output's gradient is zero but
on those rows, so that their keys' gradients are known in full.

In low precision one key of many hides below rounding. So the window is looked at by itself: with all values 0 but one
key's, exactly the rows that see it are not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perf.cases import Case, Definition, Passes
from perf.peers import Peer, Run
from swat_flex import naive_swat
from swat_flex.testing.budget import measure, rough_swat
from swat_flex.testing.hardware import allowed_use
from swat_flex.window import Window

ROWS = 64  # in each of three samples
SCORES = 2**24  # that one sample may have
THEIRS = 8.0  # how a peer rounds is its own affair; ours is held to the whole suite's rule

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Checked:
    """What the check found.

    Attributes:
        errors: largest error against float64, by tensor.
        use: share of the error budget, the largest of all tensors.
        allowed: share that passes.
        rows: queries of each head compared.
        window: what is wrong with the keys seen; None if they are those of the definition.
    """

    errors: dict[str, float]
    use: float
    allowed: float
    rows: int
    window: str | None = None

    @property
    def right(self) -> bool:
        return self.use <= self.allowed and self.window is None

    def __str__(self) -> str:
        worst = ", ".join(f"{name} off by {error:.1e}" for name, error in self.errors.items())
        found = f"{worst}; {self.use:.3g} of the error budget, {self.allowed:g} passes, on {self.rows} sampled rows"
        return found if self.window is None else f"{self.window}; {found}"


def check(peer: Peer, case: Case, leaves: tuple[Tensor, Tensor, Tensor], run: Run, passes: Passes) -> Checked:
    """Compare one run with its peer's own definition.

    Args:
        leaves: q `[B, Hq, Lq, D]`, k and v `[B, Hkv, Lk, D]` that `run` is bound to.
        run: the very callable to be timed.
        passes: "both" compares the gradients too.
    """
    definition = peer.definition(case)
    samples = _samples(case, definition)
    out = run()
    if out.shape != leaves[0].shape or out.dtype != leaves[0].dtype:
        raise ValueError(
            f"out: expected {tuple(leaves[0].shape)} {leaves[0].dtype}, got {tuple(out.shape)} {out.dtype}"
        )

    def sampled(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, first:last] for first, last in samples], 2)

    grad, found = None, [sampled(out.detach())]
    if passes == "both":
        grad = torch.zeros_like(out)
        noise = torch.Generator(out.device).manual_seed(1)
        for first, last in samples:
            part = grad[:, :, first:last]
            part.copy_(torch.randn(part.shape, generator=noise, device=out.device))
        dq, dk, dv = torch.autograd.grad(out, leaves, grad)
        found += [sampled(dq), dk, dv]
    q, k, v = (x.detach() for x in leaves)
    exact = _sampled(naive_swat, (q.double(), k.double(), v.double()), samples, case, definition, grad)
    rough = _sampled(rough_swat, (q, k, v), samples, case, definition, grad)
    budgets = [
        measure(actual, right, coarse.to(actual.dtype), name=name)
        for name, actual, right, coarse in zip(NAMES[: len(found)], found, exact, rough, strict=True)
    ]
    allowed = allowed_use(out.dtype, out.device) if peer.ours else THEIRS
    del out, grad
    return Checked(
        errors={budget.name: budget.max_error for budget in budgets},
        use=max(math.inf if math.isnan(budget.use) else budget.use for budget in budgets),
        allowed=allowed,
        rows=sum(last - first for first, last in samples),
        window=_wrong_window(peer, case, leaves, run),
    )


def _wrong_window(peer: Peer, case: Case, leaves: tuple[Tensor, Tensor, Tensor], run: Run) -> str | None:
    """Which rows see a key and should not, or the reverse; None if all is well. The values are put back."""
    q, k, v = leaves
    kept, window = v.detach().clone(), Window.of(peer.definition(case).window)
    last = case.kv_len - 1
    i = torch.arange(case.kv_len - case.q_len, case.kv_len)
    edge = last if window.left is None else last - window.left  # the oldest key that the last query sees
    keys = {max(0, min(case.kv_len // 2, edge - 1))} if case.q_len == case.kv_len else {max(0, edge), max(0, edge - 1)}
    with torch.no_grad():
        try:
            for key in sorted(keys):
                v.zero_()
                v[:, :, key] = 1
                out = peer.prepare(case, q, k, v)() if peer.copies else run()
                seen = (out != 0).any(-1).any(1).any(0).cpu()
                wrong = (seen != window.sees(i - key)).nonzero().flatten()
                if len(wrong):
                    verb = "sees" if seen[wrong[0]] else "does not see"
                    return f"query {int(i[wrong[0]])} {verb} key {key}, {len(wrong)} rows are wrong so"
        finally:
            v.copy_(kept)
    return None


def _samples(case: Case, definition: Definition) -> list[tuple[int, int]]:
    """Ranges of query rows: the first, some in the middle that start at no multiple of a tile, the last."""
    left, right = Window.of(definition.window).clamped(case.q_len, case.kv_len)
    keys = min(case.kv_len, left + right + ROWS)
    rows = max(1, min(ROWS, SCORES // (case.batch * case.q_heads * keys)))
    if case.q_len <= 3 * rows:
        return [(first, min(first + rows, case.q_len)) for first in range(0, case.q_len, rows)]
    middle = case.q_len // 2 + 3
    return [(0, rows), (middle, min(middle + rows, case.q_len - rows)), (case.q_len - rows, case.q_len)]


def _sampled(
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    samples: list[tuple[int, int]],
    case: Case,
    definition: Definition,
    grad: Tensor | None,
) -> list[Tensor]:
    """out, and with `grad` dq of the sampled rows, dk and dv of all keys, by a function of `naive_swat`'s arguments."""
    q, k, v = inputs
    window, offset = Window.of(definition.window), case.kv_len - case.q_len
    sums = [torch.zeros_like(x) for x in (k, v)] if grad is not None else []
    outs, dqs = [], []
    for first, last in samples:
        start, stop = window.keys(first, last, case.q_len, case.kv_len)
        if stop != offset + last and definition.window != (None, None):
            raise ValueError(f"window: expected causal, or all keys, got {definition.window!r}")
        parts = [
            x.requires_grad_(grad is not None) for x in (q[:, :, first:last], k[:, :, start:stop], v[:, :, start:stop])
        ]
        # `balanced` slopes by name: the function draws them in the dtype it computes in.
        out = function(*parts, definition.window, slopes=definition.slopes, activation=definition.activation)
        outs.append(out.detach())
        if grad is not None:
            dq, *dkv = torch.autograd.grad(out, parts, grad[:, :, first:last].to(out.dtype))
            dqs.append(dq)
            for total, part in zip(sums, dkv, strict=True):
                total[:, :, start:stop] += part
    return [torch.cat(parts, 2) for parts in (outs, dqs) if parts] + sums
