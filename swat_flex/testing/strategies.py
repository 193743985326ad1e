"""Hypothesis strategies of valid calls: sizes and a seed, never elements. Needs the extra `fuzz`.

Sizes favour what breaks kernels: 1, and a tile's edge from both sides. Everything shrinks towards one token, one head,
float32, no options.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from swat_flex.problem import Backend, WindowLike
from swat_flex.testing.case import BIASES, DOCUMENTS, DTYPES, LAYOUTS, SLOPES, Kind, SwatCase, largest_exponent

TILES = (16, 32, 64, 96, 128)
EDGES = (1, 2, 3, *sorted({n + d for n in TILES for d in (-1, 0, 1)}))
DIMS = (8, 1, 16, 3, 5, 24, 32, 40, 64, 65, 80, 128, 256)
ALL_LAYOUTS = tuple(itertools.product(LAYOUTS, repeat=4))  # one draw: hypothesis would vary four of them for ever
PAIRS = (2**14, 2**14, 2**14, 2**16)  # batch × heads × queries × keys of the dense reference: mostly few


# Made once: hypothesis examines each new strategy for longer than a draw takes.
_among = functools.lru_cache(maxsize=None)(st.sampled_from)
_between = functools.lru_cache(maxsize=None)(st.integers)


@functools.cache
def lengths(longest: int) -> st.SearchStrategy[int]:
    """Tokens: a tile's edge, or any number."""
    edges = [n for n in EDGES if n <= longest]
    return st.one_of(st.sampled_from(edges), st.integers(1, longest))


@functools.cache
def windows(length: int) -> st.SearchStrategy[WindowLike]:
    """All three forms; sides around tiles' edges and around the length."""
    near = [n for n in (length - 1, length, length + 1, length + 5) if n >= 1]
    keys = st.sampled_from([*(n for n in EDGES if n <= length + 1), *near])
    side = st.one_of(st.just(0), keys, st.none())
    return st.one_of(keys, st.none(), st.tuples(side, side))


@functools.cache
def _fewer(length: int) -> st.SearchStrategy[int]:
    return st.one_of(st.just(0), st.just(length - 1), st.integers(0, length - 1))


@functools.cache
def _value_dims(head_dim: int, dims: tuple[int, ...]) -> st.SearchStrategy[int]:
    return st.one_of(st.just(head_dim), st.sampled_from(dims))


@st.composite
def swat_cases(
    draw: st.DrawFn,
    /,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16", "float16"),
    activations: Sequence[str] = ("sigmoid",),
    longest: int = 200,
    pairs: int | None = None,
    least: int = 1,
    dims: Sequence[int] = DIMS,
    documents: Sequence[str] = DOCUMENTS,
    slopes: Sequence[str] = SLOPES,
    biases: Sequence[str] = BIASES,
    **fixed: Any,
) -> SwatCase:
    """A call of `flex_swat` over every argument, small enough for the dense reference.

    Args:
        dtypes, activations, dims, documents, slopes, biases: what may be drawn.
        longest: most keys.
        pairs: most elements of batch × query heads × queries × keys; None is one of `PAIRS`.
        least: what a head counts at least of these pairs.
        fixed: fields of `SwatCase` that are not drawn.
    """

    def pick(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        return fixed[name] if name in fixed else draw(strategy, label=name)

    length = pick("length", lengths(longest))
    fewer = pick("fewer", _fewer(length))
    pairs = draw(_among(PAIRS), label="pairs") if pairs is None else pairs
    room = max(1, pairs // max(least, length * (length - fewer)))
    kv_heads = pick("kv_heads", _between(1, min(4, room)))
    group = pick("group", _among(tuple(n for n in (1, 2, 3, 8) if n * kv_heads <= room) or (1,)))
    batch = pick("batch", _between(1, max(1, min(3, room // (kv_heads * group)))))
    head_dim = pick("head_dim", _among(tuple(dims)))
    dtype = pick("dtype", _among(tuple(dtypes)))
    values: dict[str, Any] = {"length": length, "fewer": fewer, "kv_heads": kv_heads, "group": group, "batch": batch}
    values |= {"head_dim": head_dim, "dtype": dtype}
    values["qk_exponent"] = pick("qk_exponent", _among((0, -2, 1, 3)))
    exponents = draw(_value_scales(dtype, length), label="exponents of v and of the gradient")
    values["v_exponent"], values["grad_exponent"] = exponents
    rest = {
        "window": windows(length),
        "value_dim": _value_dims(head_dim, tuple(dims)),
        "layouts": _among(ALL_LAYOUTS),
        "documents": _among(tuple(documents)),
        "slopes": _among(tuple(slopes)),
        "steepness": _among((0.05, 0.5, 8.0)),
        "scale": _among((None, 1.1, 0.07, -0.6)),
        "logit_bias": _among(tuple(biases)),
        "bias": _among((-1.1, 2.3, -6.1, -12.0)),
        "activation": _among(tuple(activations)),
        "seed": _between(0, 2**31),
    }
    values |= {name: pick(name, strategy) for name, strategy in rest.items()}
    return SwatCase(**values | fixed)


def _value_scales(dtype: str, length: int) -> st.SearchStrategy[tuple[int, int]]:
    """Exponents of v and of the gradient: ordinary, small, or one at overflow's edge and the other as far below."""
    edge = largest_exponent(dtype, length)
    return _among(((0, 0), (-4, 0), (3, -3), (edge, -edge), (-edge, edge)))


@functools.cache
def _keys(length: int) -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from(EDGES), st.integers(1, length))


@st.composite
def decode_cases(draw: st.DrawFn, /, *, longest: int = 200, **rules: Any) -> SwatCase:
    """A call of `swat_decode`: a ring that is filled in chunks, wrapped or not, by rows of one length or of many."""
    length = draw(lengths(longest), label="length")
    tokens = min(length, draw(_among((1, 2, 3, 8, 16)), label="tokens"))
    fixed: dict[str, Any] = {"length": length, "fewer": length - tokens}
    fixed["ring"] = draw(_between(tokens, 16), label="ring")
    fixed["window"] = draw(_keys(length), label="window")
    return draw(swat_cases(**{"documents": ("none", "late")} | fixed | rules))


@st.composite
def tail_cases(draw: st.DrawFn, /, **rules: Any) -> SwatCase:
    """Many rows whose weights all lie in σ's tail: what is wrong alike in each shows in their sum."""
    plain = _among(("contiguous", "transposed", "sliced", "columns"))
    fixed: dict[str, Any] = {
        "fewer": 0, "slopes": ("none",), "biases": ("number",), "qk_exponent": -2, "v_exponent": 0, "grad_exponent": 0,
        "scale": draw(_among((None, 0.07)), label="scale"),
        "bias": draw(_among((-6.1, -12.0, -20.0)), label="bias"),
        "layouts": (*draw(st.tuples(plain, plain, plain), label="layouts"), "contiguous"),
    }  # fmt: skip
    sizes: dict[str, Any] = {"pairs": 2**16, "documents": ("none", "packed")}
    return draw(swat_cases(**sizes | rules | fixed))


@st.composite
def long_cases(draw: st.DrawFn, /, **rules: Any) -> SwatCase:
    """A thousand rows and more of one head, so that a fault of one row among them is drawn."""
    length = draw(_between(1024, 1300), label="length")
    return draw(swat_cases(length=length, fewer=0, pairs=1, dims=(8, 1, 16, 40), **rules))


def cases_for(
    backend: Backend,
    device: str = "cpu",
    dtypes: Sequence[str] | None = None,
    family: int | None = None,
    kind: Kind = "usual",
) -> st.SearchStrategy[SwatCase]:
    """Cases that a backend takes on a device, of a size that it runs quickly.

    Args:
        dtypes: only these, where the backend has them; ValueError if it has none.
        family: `flex` compiles; the cases of one number share one program.
        kind: "decode": calls of `swat_decode`; "shards": a sequence cut into shards, in float32 and float64;
            "tails": weights in σ's tail alone; "long": a thousand rows and more.
    """
    supported = [x for x in DTYPES if SwatCase(1, 1, dtype=x).refusal(backend, device, gradients=False) is None]
    if backend == "naive":  # computes in its inputs' dtype
        supported = [dtype for dtype in supported if dtype in ("float32", "float64")]
    chosen = [dtype for dtype in supported if dtypes is None or dtype in dtypes]
    if not chosen:
        raise ValueError(f"dtypes: expected some of {', '.join(supported)} for {backend} on {device}, got {dtypes}")
    small: dict[str, Any] = {"longest": 80, "pairs": 2**11, "least": 2**9, "dims": (8, 1, 16, 40, 64)}
    sizes = small if backend == "triton" and device == "cpu" else {}  # some fifty small programs in a second
    softmax = SwatCase(1, 1, activation="softmax").refusal(backend, device, gradients=False) is None
    activations = ("sigmoid", "softmax") if softmax else ("sigmoid",)
    if kind == "decode":
        return decode_cases(dtypes=chosen, **sizes)
    wide = [dtype for dtype in chosen if dtype in ("float32", "float64")]
    if kind == "shards" and wide:  # in a lower precision a key's gradients of each shard are rounded before their sum
        return swat_cases(dtypes=wide, activations=activations, fewer=0, shards=4, **sizes)
    if kind == "tails":
        return tail_cases(dtypes=chosen, **sizes)
    if kind == "long":
        quick = [dtype for dtype in chosen if dtype != "float64"] or chosen
        return long_cases(dtypes=quick, activations=activations)
    if backend == "flex":
        return swat_cases(dtypes=chosen, longest=128, **FAMILIES[(family or 0) % len(FAMILIES)])
    return swat_cases(dtypes=chosen, activations=activations, **sizes)


# What one program of FlexAttention is compiled for.
FAMILIES: tuple[dict[str, Any], ...] = (
    {"batch": 1, "kv_heads": 2, "group": 3, "head_dim": 16, "value_dim": 24, "scale": None,
     "documents": ("none",), "slopes": ("balanced", "alibi", "tensor"), "biases": ("number", "tensor")},
    {"batch": 1, "kv_heads": 2, "group": 1, "head_dim": 64, "value_dim": 64, "scale": None,
     "documents": ("packed", "padded", "one row"), "slopes": ("balanced", "alibi", "tensor"), "biases": ("none",)},
    {"batch": 2, "kv_heads": 2, "group": 2, "head_dim": 8, "value_dim": 8, "scale": 0.07,
     "documents": ("none",), "slopes": ("none",), "biases": ("none",)},
    {"batch": 1, "kv_heads": 3, "group": 1, "head_dim": 40, "value_dim": 8, "scale": -0.6,
     "documents": ("packed", "padded", "one row"), "slopes": ("tensor",), "biases": ("number", "tensor"),
     "activations": ("softmax",)},
)  # fmt: skip
