"""What must hold of sliding-window sigmoid attention whatever its inputs: each law takes a case and a backend.

Two calls that agree only up to rounding are held to twice what rounding explains (`truth_of`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from swat_flex import flex_swat, validation
from swat_flex.problem import Backend
from swat_flex.testing.case import SwatCase
from swat_flex.testing.check import check, trains
from swat_flex.testing.truth import Arithmetic, truth_of
from swat_flex.window import Window


def run(case: SwatCase, backend: Backend, *inputs: Tensor, **changes: Any) -> Tensor:
    """The output for other inputs or options than the case's own."""
    window = changes.pop("window", case.window)
    with torch.no_grad():
        return flex_swat(*(inputs or case.tensors()), window, backend=backend, **case.options() | changes)


def allowed(case: SwatCase, backend: Backend, **changes: Any) -> Tensor:
    """How far the output may be from the exact one, of the case or of one with other options."""
    options = {"backend": "naive", "window": case.window, **case.options(), **changes}
    operands = validation.resolve(*case.tensors(), **options)
    return truth_of(operands, None, Arithmetic.of(backend, "cpu", case.torch_dtype)).allowed["out"]


def assert_close(a: Tensor, b: Tensor, room: Tensor, what: str) -> None:
    share = ((a.double() - b.double()).abs() / (2 * room)).nan_to_num(nan=float("inf"))
    assert share.numel() == 0 or share.max() <= 1, f"{what}: {float(share.max()):.3g} of what rounding explains"


def agreement(case: SwatCase, backend: Backend) -> None:
    """With the definition: values, every gradient, unseen keys."""
    check(case, backend)


def causality(case: SwatCase, backend: Backend) -> None:
    """No bit of a row depends on what comes later than its window's right side, queries included."""
    _, right = Window.of(case.window).clamped(case.length, case.length)
    keep = case.length // 2
    q, k, v = (x.clone() for x in case.tensors())
    for x, end in ((q, keep - case.fewer), (k, keep + right), (v, keep + right)):
        x[:, :, max(end, 0) :] = 2.0
    rows = slice(0, max(keep - case.fewer, 0))
    assert torch.equal(run(case, backend, q, k, v)[:, :, rows], run(case, backend, *copies(case))[:, :, rows])


def copies(case: SwatCase) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the memory layout that `clone` gives, which decides the order of sums."""
    q, k, v = (x.clone() for x in case.tensors())
    return q, k, v


def inert_zero(case: SwatCase, backend: Backend) -> None:
    """A key whose value is 0 changes nothing: true of a sigmoid, false of a softmax.

    Not a bit, but in flex, which on its way divides by the sum of the weights.
    """
    case = dataclasses.replace(case, activation="sigmoid")
    q, k, v = copies(case)
    j = case.seed % case.length
    v[:, :, j] = 0
    before = run(case, backend, q, k, v)
    k[:, :, j] += 3
    after = run(case, backend, q, k, v)
    if backend == "flex":
        assert_close(after, before, allowed(case, backend), f"key {j} without a value")
    else:
        assert torch.equal(after, before)


def linearity(case: SwatCase, backend: Backend) -> None:
    """f(v) − f(v/2) = f(v/2), and f(−v) = −f(v) to the bit."""
    q, k, v = copies(case)
    whole, half = run(case, backend, q, k, v), run(case, backend, q, k, v / 2)
    assert_close(whole.double() - half.double(), half, allowed(case, backend), "f(v) − f(v/2) against f(v/2)")
    # In place: `-v` may have other strides along axes of one element, and products sum in another order.
    assert torch.equal(run(case, backend, q, k, v.neg_()), -whole)


def permuted_heads(case: SwatCase, backend: Backend) -> None:
    """Key heads exchanged, with their query heads, slopes and biases: the outputs are exchanged."""
    q, k, v = case.tensors()
    order = torch.arange(case.kv_heads).flip(0)
    own = (order[:, None] * case.group + torch.arange(case.group)).flatten()
    options = {name: x[own] if name in ("slopes", "logit_bias") and isinstance(x, Tensor) else x
               for name, x in case.options().items()}  # fmt: skip
    if isinstance(options["slopes"], str):
        options["slopes"] = torch.linspace(-0.5, 0.3, case.q_heads, dtype=torch.float32)
    if case.dtype == "float64" and isinstance(options["slopes"], Tensor):
        options["slopes"] = options["slopes"].double()
    back = {**options, "slopes": None if options["slopes"] is None else options["slopes"][own.argsort()]}
    back["logit_bias"] = case.options()["logit_bias"]
    out = run(case, backend, q[:, own], k[:, order], v[:, order], **options)
    plain = run(case, backend, q, k, v, **back)
    room = allowed(case, backend, **back)
    assert_close(out, plain[:, own], room[:, own], "heads permuted")


def shift(case: SwatCase, backend: Backend) -> None:
    """Distances count, positions do not: the same tokens behind padding."""
    q, k, v = case.tensors()
    before = 1 + case.seed % 40
    ids = case.options()["document_ids"]
    ids = torch.zeros(case.length, dtype=torch.int64) if ids is None else ids.long()
    moved = [torch.cat((torch.full((*x.shape[:2], before, x.shape[3]), 7.0, dtype=x.dtype), x), 2) for x in (k, v)]
    padded = torch.cat((torch.full((*ids.shape[:-1], before), -1), ids), -1)
    assert_close(
        run(case, backend, q, *moved, document_ids=padded),
        run(case, backend),
        allowed(case, backend),
        f"shifted by {before}",
    )


def prefix(case: SwatCase, backend: Backend) -> None:
    """Rows of the first n tokens do not know that more follow."""
    _, right = Window.of(case.window).clamped(case.length, case.length)
    n = case.length - 1 - case.seed % max(1, case.length // 2)
    rows = n - right - case.fewer
    if rows < 1:
        return
    q, k, v = case.tensors()
    ids = case.options()["document_ids"]
    ids = ids if ids is None else ids[..., :n]
    out = run(case, backend, q[:, :, : n - case.fewer], k[:, :, :n], v[:, :, :n], document_ids=ids)
    whole = run(case, backend)
    assert_close(out[:, :, :rows], whole[:, :, :rows], allowed(case, backend)[:, :, :rows], f"prefix of {n}")


def chunks(case: SwatCase, backend: Backend) -> None:
    """The last queries with only the keys their window reaches."""
    q, k, v = case.tensors()
    start = q.shape[2] // 2
    left, _ = Window.of(case.window).clamped(q.shape[2], case.length)
    first = max(0, case.fewer + start - left)
    ids = case.options()["document_ids"]
    ids = ids if ids is None else ids[..., first:]
    out = run(case, backend, q[:, :, start:], k[:, :, first:], v[:, :, first:], document_ids=ids)
    assert_close(out, run(case, backend)[:, :, start:], allowed(case, backend)[:, :, start:], f"chunk from {start}")


def packing(case: SwatCase, backend: Backend) -> None:
    """Documents in one row against each alone."""
    case = dataclasses.replace(case, fewer=0, documents="none")
    q, k, v = case.tensors()
    cut = case.length // 2
    ids = (torch.arange(case.length) >= cut).long()
    packed = run(case, backend, q, k, v, document_ids=ids)
    room = allowed(case, backend, document_ids=ids)
    for part in (slice(0, cut), slice(cut, None)):
        if q[:, :, part].shape[2]:
            alone = run(case, backend, q[:, :, part], k[:, :, part], v[:, :, part])
            assert_close(packed[:, :, part], alone, room[:, :, part], f"document {part}")


def silent_padding(case: SwatCase, backend: Backend) -> None:
    """Padding's rows are 0, and neither its queries nor its keys and values have a gradient."""
    case = dataclasses.replace(case, documents="padded")
    ids = case.options()["document_ids"].expand(case.batch, case.length) < 0
    results = case.call(backend, gradients=trains(backend, "cpu", case.dtype, case.activation))
    for name in results.keys() & {"out", "dq", "dk", "dv"}:
        padding = ids[:, case.fewer :] if name in ("out", "dq") else ids
        assert (results[name].transpose(1, 2)[padding] == 0).all(), name


def wide_window(case: SwatCase, backend: Backend) -> None:
    """A window of the whole length, and one beyond it, is plain causal attention."""
    plain = run(case, backend, window=None)
    causal = dataclasses.replace(case, window=None)
    for window in (case.length, case.length + 7, (None, 0)):
        assert_close(run(case, backend, window=window), plain, allowed(causal, backend), f"window {window}")


LAWS = (agreement, causality, inert_zero, linearity, permuted_heads, shift, prefix, chunks, packing, silent_padding,
        wide_window)  # fmt: skip
