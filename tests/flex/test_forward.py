"""The forward on a CPU against the definition.

A program takes seconds to compile. Those of three families are compiled in every run, those of the others at night; in
between FlexAttention runs uncompiled there, which tries all but the lists of tiles and the compiler. Cases share
programs: lengths, windows, dtypes, strides and ids do not make a new one.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from swat_flex import flex_swat
from swat_flex.backends.flex import programs
from swat_flex.backends.flex.blocks import padded_blocks
from swat_flex.testing.budget import assert_within_budget, exact_swat, rough_swat

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "expanded", "sliced")
SHORT = (1, 2, 63, 64, 65, 127, 128)
FEWER = ((1, 1000), (2, 1000), (65, 1023))  # queries than keys

pytestmark = pytest.mark.xdist_group("flex")  # its tests share programs


@dataclass(frozen=True)
class Family:
    """What a program is compiled for, lengths apart; `compiled` are the lengths that every run compiles for."""

    lengths: tuple[int | tuple[int, int], ...]
    compiled: tuple[int | tuple[int, int], ...] = ()
    heads: tuple[int, int] = (2, 2)
    dims: tuple[int, int] = (64, 64)
    activation: str = "sigmoid"
    documents: tuple[str, ...] = ()
    logit_bias: bool = False
    slopes: str | None = "balanced"


FAMILIES = (
    Family((*SHORT, 129, 1000, 1025), SHORT, heads=(3, 3)),
    Family((*SHORT, 129, 1000), SHORT[:-1], heads=(3, 1), dims=(8, 40), documents=("packed", "padded", "anyhow")),
    Family((*SHORT, 129), heads=(8, 1), dims=(40, 8), activation="softmax"),
    Family(SHORT, heads=(8, 1), dims=(1, 1), logit_bias=True),
    Family(SHORT, dims=(80, 64)),
    Family(((1, 129), (64, 200), (128, 256)), dims=(128, 128)),
    Family(SHORT, heads=(3, 1), dims=(256, 256)),
    Family((128, 65, 100), dims=(64, 80), activation="softmax", documents=("packed", "padded", "anyhow")),
    Family(SHORT[1:4], dims=(64, 3), slopes=None),
    Family(FEWER, FEWER, dims=(16, 16), documents=("packed", "padded"), logit_bias=True),
)


def windows(length: int) -> tuple[object, ...]:
    return (1, 2, 63, 64, 65, 128, 129, length, length + 5, (3, 2), (None, 4), None)


def cases(compiled: bool) -> list[object]:
    """Every length of every family, the rest dealt round so that each meets each."""
    deal = itertools.count()
    dealt = []
    for number, family in enumerate(FAMILIES):
        for lengths, turn in itertools.product(family.lengths, range(3)):
            q_len, kv_len = lengths if isinstance(lengths, tuple) else (lengths, lengths)
            n = next(deal)
            choice = windows(kv_len)[n % 12], DTYPES[(n + turn) % 3], LAYOUTS[(n // 3) % 4]
            documents = family.documents[n % len(family.documents)] if family.documents else None
            name = f"{number}-{q_len}-{kv_len}-{n}"
            in_every_run = lengths in family.compiled
            if compiled or not in_every_run:
                marks = pytest.mark.slow if compiled and not in_every_run else ()
                dealt.append(pytest.param(family, q_len, kv_len, *choice, documents, id=name, marks=marks))
    return dealt


def tensor(layout: str, *shape: int) -> Tensor:
    batch, heads, length, width = shape
    if layout == "transposed":
        return torch.randn(batch, length, heads, width).transpose(1, 2)
    if layout == "expanded":
        return torch.randn(1, heads, length, width).expand(batch, -1, -1, -1)
    if layout == "sliced":
        return torch.randn(batch, heads, length + 3, 2 * width)[:, :, 2 : length + 2, ::2]
    return torch.randn(shape)


def document_ids(kind: str, batch: int, length: int) -> Tensor:
    if kind == "packed":
        return (torch.rand(length) < 0.05).cumsum(0)
    if kind == "padded":
        return torch.where(torch.arange(length) < torch.randint(length, (batch, 1)), -1, 0)
    return torch.randint(-1, 3, (batch, length))


each_case = functools.partial(
    pytest.mark.parametrize, ("family", "q_len", "kv_len", "window", "dtype", "layout", "documents")
)


@each_case(cases(compiled=True))
def test_compiled_forward_is_within_budget(family, q_len, kv_len, window, dtype, layout, documents):
    check(family, q_len, kv_len, window, dtype, layout, documents)


@each_case(cases(compiled=False))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_uncompiled_forward_is_within_budget(family, q_len, kv_len, window, dtype, layout, documents, monkeypatch):
    monkeypatch.setattr(programs, "compiled", lambda *key: programs.attend)
    check(family, q_len, kv_len, window, dtype, layout, documents)


def call(family, q_len, kv_len, window, dtype, layout, documents):
    """Arguments and options of a case."""
    torch.manual_seed(q_len + kv_len)
    (q_heads, kv_heads), (head_dim, value_dim) = family.heads, family.dims
    q = tensor(layout, 2, q_heads, q_len, head_dim).to(dtype)
    k = tensor(layout, 2, kv_heads, kv_len, head_dim).to(dtype)
    v = tensor(layout, 2, kv_heads, kv_len, value_dim).to(dtype)
    options = {
        "slopes": family.slopes,
        "logit_bias": torch.randn(q_heads) if family.logit_bias else None,
        "document_ids": documents and document_ids(documents, 2, kv_len),
        "activation": family.activation,
    }
    return (q, k, v, window), options


def check(*case):
    arguments, options = call(*case)
    out = flex_swat(*arguments, backend="flex", **options)
    assert out.dtype == arguments[0].dtype
    exact, rough = exact_swat(*arguments, **options), rough_swat(*arguments, **options)
    assert_within_budget(out, exact=exact, rough=rough, window=arguments[3])


def test_output_axes_lie_in_memory_as_those_of_q():
    q, k, v = torch.randn(3, 2, 100, 3, 64).transpose(2, 3).unbind()
    assert flex_swat(q, k, v, 20, backend="flex").transpose(1, 2).is_contiguous()
    assert flex_swat(q.contiguous(), k, v, 20, backend="flex").is_contiguous()


def test_rows_that_see_nothing_are_zero():
    q, k, v = torch.randn(2, 3, 100, 8), torch.randn(2, 1, 100, 8), torch.randn(2, 1, 100, 40)
    ids = torch.where(torch.arange(100) < 40, -1, torch.arange(100) // 30)
    out = flex_swat(q, k, v, 20, document_ids=ids, backend="flex")
    assert (out[:, :, :40] == 0).all()
    assert (out[:, :, 40:] != 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_unseen_keys_do_not_reach_a_row(poison):
    q, k, v = torch.randn(3, 2, 3, 100, 64).unbind()
    before = flex_swat(q, k, v, 10, backend="flex")
    k = k.clone()
    k[:, :, 50] = poison
    after = flex_swat(q, k, v, 10, backend="flex")
    unseen = torch.tensor([i for i in range(100) if not 0 <= i - 50 < 10])
    assert torch.equal(before[:, :, unseen], after[:, :, unseen])


def test_weights_of_far_tails_keep_their_relative_error():
    """One key per row, logit −20: the output is σ(−20) itself."""
    q, k, v = torch.full((2, 3, 64, 64), -2.5), torch.ones(2, 3, 64, 64), torch.ones(2, 3, 64, 64)
    out = flex_swat(q, k, v, 1, backend="flex")
    weight = torch.tensor(-20.0, dtype=torch.float64).sigmoid()
    assert ((out - weight).abs() / weight).max() < 2**-12


def test_cases_of_one_family_and_number_of_tiles_share_a_program(monkeypatch):
    """What a call compiles for, of every case above; where nothing is padded the layout of q enters, too."""
    keys, sizes = set(), set()

    def compiled(*key):
        keys.add(key)
        return lambda inputs, *_: torch.zeros(*inputs.q.shape[:3], 1)

    monkeypatch.setattr(programs, "compiled", compiled)
    for case in cases(compiled=True):
        family, q_len, kv_len, *_ = case.values
        arguments, options = call(*case.values)
        flex_swat(*arguments, backend="flex", **options)
        sizes.add((family, padded_blocks(q_len, per_doubling=1), padded_blocks(kv_len, per_doubling=1)))
    assert len(sizes) == 16
    assert len(keys) <= 20
