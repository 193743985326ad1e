"""Hold a long call against the definition: sampled query rows, and the gradients that they alone cause.

Rows [r, s) of a long problem are a short one of their own: their queries, the keys that any of them sees, and, where
the window looks ahead, the rows up to the last of these keys. `naive_swat` solves it in float64. Keys receive gradients
from many rows; so the call runs once more with an output gradient that is zero but in the sampled rows, where the
gradients of all other keys must be exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from swat_flex.operands import Operands
from swat_flex.problem import Problem
from swat_flex.testing import budget

ROWS = 96  # of one sample: no multiple of the larger tiles
PAIRS = 2**24  # elements of a sample's scores, per head, at most where 16 rows allow it
ELEMENTS = 4 * budget.ENOUGH  # of an output that is sampled, if it has so many


@dataclass(frozen=True)
class Sample:
    """Rows of the query heads that share a key head, in one batch, and all keys that these rows see."""

    batch: int
    heads: slice
    kv_head: int
    rows: slice
    keys: slice

    def of_queries(self, x: Tensor, rows: slice) -> Tensor:
        return x[self.batch : self.batch + 1, self.heads, rows]

    def of_keys(self, x: Tensor) -> Tensor:
        return x[self.batch : self.batch + 1, self.kv_head : self.kv_head + 1, self.keys]


def samples(problem: Problem) -> list[Sample]:
    """Choose the last rows, the first and some in between, of batches and heads from the first to the last.

    A window without a bound on the right makes rows a short problem only at the end: there the last ones alone.
    """
    pairs, group = problem.batch * problem.kv_heads, problem.q_heads // problem.kv_heads
    left, right = problem.window.clamped(problem.q_len, problem.kv_len)
    rows = min(problem.q_len, ROWS, max(16, PAIRS // (left + right + ROWS)))
    enough = -(-ELEMENTS // (rows * group * min(problem.head_dim, problem.value_dim)))
    dealt = {0: 0, 1: pairs - 1, 2: (pairs - 1) // 2}  # then in order
    found: list[Sample] = []
    for i in range(max(3, min(pairs, enough, 64))):
        first = (problem.q_len - rows, 0, (problem.q_len - rows) // 2)[i % 3]
        start, stop = problem.window.keys(first, first + rows, problem.q_len, problem.kv_len)
        batch, kv_head = divmod(dealt.get(i, i), problem.kv_heads)
        heads = slice(kv_head * group, (kv_head + 1) * group)
        sample = Sample(batch, heads, kv_head, slice(first, first + rows), slice(start, stop))
        short = (_last_row(sample, problem) - first) * (stop - start) <= PAIRS
        if (i == 0 or short) and sample not in found:
            found.append(sample)
    return found


def _last_row(sample: Sample, problem: Problem) -> int:
    """Return where rows must end so that the last one and the last key share a position."""
    return max(int(sample.rows.stop), int(sample.keys.stop) - (problem.kv_len - problem.q_len))


def _apart(found: list[Sample]) -> list[Sample]:
    """Choose those samples whose keys receive gradients from no other sample."""
    kept: list[Sample] = []
    for sample in found:
        beside = (other.keys for other in kept if (other.batch, other.kv_head) == (sample.batch, sample.kv_head))
        if not any(sample.keys.start < keys.stop and keys.start < sample.keys.stop for keys in beside):
            kept.append(sample)
    return kept


class SampledReference:
    """The exact and the rough results of a call's samples, by name, computed when first needed.

    Args:
        operands: the call, in float32, bfloat16 or float16.
        grad: the output's gradient, `[B, Hq, Lq, Dv]`.
    """

    def __init__(self, operands: Operands, grad: Tensor) -> None:
        self._operands, self._grad, self._problem = operands, grad, operands.problem()
        self._samples = samples(self._problem)
        self._apart = _apart(self._samples)

    def sampled_gradient(self) -> Tensor:
        """Return the output's gradient, set to zero but in the rows whose key gradients are checked."""
        grad = torch.zeros_like(self._grad)
        for sample in self._apart:
            sample.of_queries(grad, sample.rows).copy_(sample.of_queries(self._grad, sample.rows))
        return grad

    def complaint(self, results: Mapping[str, Tensor], sampled: Mapping[str, Tensor]) -> str | None:
        """Say what is wrong with results, or None.

        Args:
            results: any of "out", "dq", "dk", "dv" of the whole call.
            sampled: the same of the same call with `sampled_gradient`; only dk and dv are read.
        """
        for name, x in results.items():
            if not x.isfinite().all():
                return f"{name}: expected finite numbers, got {int(x.numel() - x.isfinite().sum())} others"
        for name in ("dk", "dv"):
            if name not in sampled:
                continue
            reached = sum(int(sample.of_keys(sampled[name]).count_nonzero()) for sample in self._apart)
            if stray := int(sampled[name].count_nonzero()) - reached:
                return f"{name}: expected 0 for keys that no gradient reaches, got {stray} other numbers"
        for name in results:
            parts = []
            for sample, exact, rough in self._solved:
                if name not in ("dk", "dv"):
                    parts.append((sample.of_queries(results[name], sample.rows), exact[name], rough[name]))
                elif sample in self._apart:
                    parts.append((sample.of_keys(sampled[name]), exact[name], rough[name]))
            actual, right, near = (torch.cat([x.flatten() for x in each]) for each in zip(*parts, strict=True))
            found = budget.measure(actual, right, near, name=name, window=self._window)
            if not found.holds:
                return str(found)
        return None

    @property
    def _window(self) -> tuple[int | None, int | None]:
        return self._problem.window.left, self._problem.window.right

    @cached_property
    def _solved(self) -> list[tuple[Sample, dict[str, Tensor], dict[str, Tensor]]]:
        """Each sample with its exact results and its rough ones."""
        return [(sample, *self._solve(sample)) for sample in self._samples]

    def _solve(self, sample: Sample) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        given, batch = self._operands, self._operands.q.shape[0]
        count = sample.rows.stop - sample.rows.start
        rows = slice(sample.rows.start, _last_row(sample, self._problem))
        inputs = sample.of_queries(given.q, rows), sample.of_keys(given.k), sample.of_keys(given.v)
        grad = sample.of_queries(self._grad, rows).clone()
        grad[:, :, count:] = 0
        slopes, logit_bias = (None if x is None else x[sample.heads] for x in (given.slopes, given.logit_bias))
        ids = given.document_ids
        if ids is not None:
            ids = ids.expand(batch, -1)[sample.batch : sample.batch + 1, sample.keys]
        options: dict[str, Any] = {"slopes": slopes, "logit_bias": logit_bias, "document_ids": ids}
        options |= {"scale": given.scale, "activation": given.activation}
        exact = budget.exact_results(inputs, self._window, grad, **options)
        rough = budget.with_gradients(budget.rough_swat, inputs, self._window, grad, **options)
        for found in (exact, rough):
            found.update({name: found[name][:, :, :count] for name in ("out", "dq")})
        return exact, rough
