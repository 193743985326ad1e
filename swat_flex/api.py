"""`flex_swat`, the door: resolve the arguments, choose a backend, run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.autograd import forward_ad

from swat_flex import dispatch, tuned, validation
from swat_flex.operands import Operands
from swat_flex.problem import Activation, Backend, Slopes, WindowLike


def flex_swat(
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
) -> Tensor:
    """Sliding-window sigmoid attention: o_i = Σ σ(scale·⟨q_i, k_j⟩ + slopes·|i − j| + logit_bias) v_j, no normaliser.

    The sum runs over the keys j with 0 ≤ i − j < window. The last query and the last key share a position, so with
    fewer queries than keys row r is position Lk − Lq + r.

    >>> q, k, v = torch.randn(3, 1, 8, 1024, 64).unbind()
    >>> flex_swat(q, k, v, window=256).shape
    torch.Size([1, 8, 1024, 64])

    Args:
        q: `[B, Hq, Lq, D]`, float32, bfloat16 or float16 (float64 on a CPU); any strides. D and Dv from 1 to 256.
        k: `[B, Hkv, Lk, D]`; Hq is a multiple of Hkv (query head h reads key head h // (Hq / Hkv)), Lq ≤ Lk.
        v: `[B, Hkv, Lk, Dv]`.
        window: keys per query, its own included; or (left, right), the keys with −right ≤ i − j ≤ left, each side a
            number of tokens or None for no bound; or None for plain causal attention. May exceed the length.
        slopes: linear bias in logits per token of distance; **negative favours recent keys** (FlashAttention's
            `alibi_slopes` with the sign turned). "balanced": half the heads negative, half positive
            (`balanced_alibi_slopes`); "alibi": all negative (`alibi_slopes`); None; or `[Hq]` float32 (float64 when q
            is), differentiable.
        scale: factor on ⟨q, k⟩; None is D^(−1/2).
        logit_bias: added to every logit, for instance −log(window): None, a float, or `[Hq]` float32 (float64 when q
            is), differentiable.
        document_ids: signed ints `[B, Lk]` or `[Lk]`, in any order: tokens see each other only under equal ids. A
            negative id is padding: sees nothing, is seen by nothing, its output rows are exactly 0.
        activation: "sigmoid"; "softmax" over the visible keys, for baselines; "tanh-sigmoid", the 11-bit hardware
            tanh, a weight's relative error up to 4% at a logit of −5, 27% at −7, 200% at −9. A row that sees nothing is
            0 in each.
        backend: "auto" chooses (see `explain`); a backend asked for by name is never replaced.

    Returns:
        `[B, Hq, Lq, Dv]` in q's dtype, its axes in memory in q's order. Sums are float32, float64 for float64.

    An unseen key, NaN and infinity included, and any finite unseen value leave a row unchanged to the bit. A NaN or
    infinite unseen value may reach rows that share its tile.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a shape, dtype, device or range that breaks a rule above.
        NotImplementedError: a backend asked for by name that cannot run the call; the message says why. Forward-mode
            differentiation, which backend="naive" alone has.

    Source: SWAT, arXiv 2502.18845, Eq. 5.
    """
    operands = validation.resolve(q, k, v, window, slopes, scale, logit_bias, document_ids, activation, backend)
    chosen = dispatch.choose(operands.problem(), backend).backend
    if chosen != "naive":
        _refuse_tangents(operands, chosen)
    return dispatch.BACKENDS[chosen].swat(operands)


class Configured(NamedTuple):
    """One thing that can be tuned, the configuration that a call would run with, and where that comes from."""

    tunable: str
    configuration: str
    origin: str

    def __str__(self) -> str:
        return f"{self.tunable}: {self.configuration} ({self.origin})"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a call would run, with which configuration, and why.

    Attributes:
        backend: its name.
        why: the reason for the choice.
        configuration: one entry, and one printed line, for each thing that can be tuned. Its origin is a measurement in
            the user's cache, a preset with the versions it was made with, or the default.
        others: why not each other backend, by name.
    """

    backend: str
    why: str
    configuration: tuple[Configured, ...]
    others: dict[str, str]

    def __str__(self) -> str:
        others = (f"not {name}: {reason}" for name, reason in self.others.items())
        return "\n".join((f"{self.backend}: {self.why}", *map(str, self.configuration), *others))


def explain(
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
) -> Explanation:
    """Say what `flex_swat` would run for these arguments, without running it. Same arguments, same errors.

    >>> print(explain(*torch.randn(3, 1, 8, 1024, 64).unbind(), window=256))  # doctest: +ELLIPSIS
    cpp: ...
    """
    operands = validation.resolve(q, k, v, window, slopes, scale, logit_bias, document_ids, activation, backend)
    problem = operands.problem()
    choice = dispatch.choose(problem, backend)
    configuration = []
    for tunable in dispatch.BACKENDS[choice.backend].tunables(problem):
        found = tuned.find(tunable, problem)
        config = tunable.default(problem) if found is None else found.config
        configuration.append(Configured(tunable.name, str(config), tuned.origin(found)))
    others = {
        name: module.supports(problem) or "not the choice for this device"
        for name, module in dispatch.BACKENDS.items()
        if name != choice.backend
    }
    return Explanation(choice.backend, choice.why, tuple(configuration), others)


def _refuse_tangents(operands: Operands, backend: str) -> None:
    """Refuse forward mode: torch gives an operator without a formula for it a derivative of 0."""
    for name in ("q", "k", "v", "slopes", "logit_bias"):
        x = getattr(operands, name)
        # unpack_dual has no annotations.
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"{name}: forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) is for "
                f"backend='naive', got a tangent in backend {backend!r}"
            )
