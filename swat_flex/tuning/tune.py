"""`swat_flex.tune`: measure a call's candidates on this machine and remember the fastest right ones."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import Tensor

from swat_flex import validation
from swat_flex.problem import Activation, Backend, Slopes, WindowLike

if TYPE_CHECKING:
    from swat_flex.tuning.results import Tuned


def tune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: WindowLike,
    *,
    slopes: Slopes = "balanced",
    scale: float | None = None,
    logit_bias: Tensor | float | None = None,
    document_ids: Tensor | None = None,
    activation: Activation = "sigmoid",
    backend: Backend = "auto",
    backward: bool | None = None,
    seconds: float = 30.0,
) -> Tuned:
    """Find the fastest right configuration for calls like this one; every process uses it from its next first call on.

    Candidates run on random tensors of the same sizes. Each must first reproduce the definition on sampled rows. Calls
    of one bucket share the result: window sides rounded up to 64 tokens, lengths and batch × heads to powers of two.
    On a GPU candidates run in worker processes: a script needs the usual `if __name__ == "__main__":` guard.

    >>> tuned = tune(*torch.randn(3, 1, 2, 256, 16).unbind(), 64, seconds=2)
    >>> tuned.outcomes[0].name
    'banded.forward'

    Args:
        q: `[B, Hq, Lq, D]`; read for its sizes alone, as k and v are.
        k: `[B, Hkv, Lk, D]`.
        v: `[B, Hkv, Lk, Dv]`.
        window, slopes, scale, logit_bias, document_ids: as in `flex_swat`.
        activation: "sigmoid" or "softmax".
        backend: "auto" tunes what may run here and the choice between them; a name tunes that backend alone.
        backward: whether the backward is tuned too; None is where the call would need one.
        seconds: for all searches together.

    Returns:
        What was found, printable. After Ctrl-C what was measured until then.

    Raises:
        TypeError, ValueError: as `flex_swat`; also float64 and the hardware tanh, which have nothing to be checked by.
        NotImplementedError: a backend asked for by name that cannot run the call.
    """
    started = time.monotonic()
    from dataclasses import replace

    from swat_flex.tuning.plan import jobs_of, plan
    from swat_flex.tuning.search import run_searches

    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise TypeError(f"seconds: expected a number, got {type(seconds).__name__}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected a positive number, got {seconds}")
    operands = validation.resolve(q, k, v, window, slopes, scale, logit_bias, document_ids, activation, backend)
    problem = operands.problem()
    if backward is not None:
        problem = replace(problem, needs_grad=backward, learns_bias=backward and problem.learns_bias)
    ids = None if document_ids is None else document_ids.detach().cpu()
    planned = plan(jobs_of(problem, backend, seconds, document_ids=ids), seconds)
    return run_searches(planned, seconds - (time.monotonic() - started), lambda *_: None, lambda _: None)
