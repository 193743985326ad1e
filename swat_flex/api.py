"""`flex_swat`, the door: validate, describe, choose, run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from swat_flex import dispatch, reference, validation, winners
from swat_flex.positions import slopes_of
from swat_flex.problem import Activation, Backend, Slopes, SwatProblem, WindowLike
from swat_flex.window import Window
from swat_flex.winners import Call


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
    q, k, v, problem = describe(q, k, v, window, slopes, scale, logit_bias, document_ids, activation, backend)
    call = _call(q, k, v, slopes, logit_bias, document_ids, problem) if backend == "auto" else None
    choice = dispatch.choose(problem, backend, call)
    if choice.backend == "naive":
        return reference.attend(q, k, v, problem.window, slopes, scale, logit_bias, document_ids, activation)
    _refuse_tangents(choice.backend, q=q, k=k, v=v, slopes=slopes, logit_bias=logit_bias)
    heads = problem.q_heads
    if logit_bias is not None and not isinstance(logit_bias, Tensor):
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        logit_bias = torch.full((heads,), logit_bias, dtype=dtype, device=q.device)
    scale = problem.head_dim**-0.5 if scale is None else float(scale)
    slopes = slopes_of(slopes, heads, q)
    swat = dispatch.BACKENDS[choice.backend].swat
    return swat(q, k, v, slopes, logit_bias, document_ids, problem.window, scale, activation)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a call would run, with which configuration, and why; `others` says why not each other backend.

    `source` names the measurement behind the configuration, in the user's cache or among the shipped presets with the
    versions it was made with, or says that it is the default.
    """

    backend: str
    why: str
    configuration: str
    source: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.why}", f"configuration: {self.configuration} ({self.source})"]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.others.items()])


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
    """What `flex_swat` would run for these arguments, without running it. Same arguments, same errors.

    >>> print(explain(*torch.randn(3, 1, 8, 1024, 64).unbind(), window=256))  # doctest: +ELLIPSIS
    banded: ...
    """
    *_, problem = describe(q, k, v, window, slopes, scale, logit_bias, document_ids, activation, backend)
    call = _call(q, k, v, slopes, logit_bias, document_ids, problem)
    choice = dispatch.choose(problem, backend, call if backend == "auto" else None)
    others = {
        name: dispatch.why_not(problem, name) or "not the choice for this device"
        for name in ("triton", "flex", "banded", "naive")
        if name != choice.backend
    }
    configuration, source = _configured(choice.backend, problem, call)
    return Explanation(choice.backend, choice.why, configuration, source, others)


def _configured(backend: str, problem: SwatProblem, call: Call | None) -> tuple[str, str]:
    """The configuration that a backend runs a problem with, and where it comes from, both in words."""
    tunables = dispatch.BACKENDS[backend].tunables(problem) if backend in dispatch.BACKENDS else ()
    chosen: dict[str, tuple[str, str]] = {}
    for tunable in tunables:
        found = None
        if call is not None:
            found = winners.find(tunable, call if tunable.joint else call._replace(backward=False))
        config = tunable.default(problem) if found is None else found.config
        chosen[tunable.name.rpartition(".")[2]] = str(config), winners.describe(found)
    said = [list(dict.fromkeys(column)) for column in zip(*chosen.values(), strict=True)]
    if not chosen:
        return "none", "default"
    configs, sources = (
        values[0] if len(values) == 1 else ", ".join(f"{name}: {words[column]}" for name, words in chosen.items())
        for column, values in enumerate(said)
    )
    return configs, sources


def _call(
    q: Tensor, k: Tensor, v: Tensor, slopes: object, logit_bias: object, document_ids: object, problem: SwatProblem
) -> Call | None:
    """What a measurement is looked up for; None while tracing, where sizes may be symbols."""
    if torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        return None
    activation, backward = problem.activation, problem.needs_grad
    return Call.of(q, k, v, slopes, logit_bias, document_ids, problem.window, activation, backward)


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: WindowLike,
    slopes: Slopes,
    scale: float | None,
    logit_bias: Tensor | float | None,
    document_ids: Tensor | None,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, SwatProblem]:
    """q, k, v as they enter the backend, and the problem they make; raises for the first rule broken."""
    validation.check_kinds(q, k, v)
    device_type = q.device.type
    if autocasts(device_type):
        # As scaled_dot_product_attention does: float64 stays.
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    validation.check(q, k, v, window, slopes, scale, logit_bias, document_ids, activation, backend)
    batch, q_heads, q_len, head_dim = q.shape
    problem = SwatProblem(
        batch=batch,
        q_heads=q_heads,
        kv_heads=k.shape[1],
        q_len=q_len,
        kv_len=k.shape[2],
        head_dim=head_dim,
        value_dim=v.shape[3],
        dtype=q.dtype,
        device_type=device_type,
        window=Window.of(window),
        activation=activation,
        has_slopes=slopes is not None,
        has_logit_bias=logit_bias is not None,
        has_documents=document_ids is not None,
        needs_grad=torch.is_grad_enabled()
        and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v, slopes, logit_bias)),
    )
    return q, k, v, problem


def _refuse_tangents(backend: str, **tensors: Tensor | object) -> None:
    """Forward mode: torch gives an operator without a formula for it a derivative of 0."""
    for name, x in tensors.items():
        # unpack_dual has no annotations.
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            raise NotImplementedError(
                f"{name}: forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) is for "
                f"backend='naive', got a tangent in backend {backend!r}"
            )


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device; False for types that it does not know."""
    if device_type == "meta":
        return False
    # torch.compile knows autocast's types alone, and cannot trace the question in torch 2.11.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)
