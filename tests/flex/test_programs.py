"""How often `flex` compiles, what it refuses, and what it shares with torch.compile."""

from __future__ import annotations

import functools
import io
import re
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from swat_flex import explain, flex_swat, modifiers, tracing
from swat_flex.backends.flex import blocks as block_lists
from swat_flex.backends.flex import programs
from swat_flex.backends.flex.blocks import BLOCK, KEPT, Form, Grid, band, cached_band, padded_blocks
from swat_flex.backends.flex.op import _padded
from swat_flex.modifiers import band_mask, log_sigmoid_score, sigmoid_sum
from swat_flex.testing.budget import assert_within_budget, exact_swat, rough_swat
from swat_flex.window import Window

LENGTHS = tuple(range(8, 258, 5))
DIM = 64  # as in one of testing.strategies.FAMILIES, whose program tests/properties runs

pytestmark = pytest.mark.xdist_group("flex")  # its tests share programs


def qkv(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(3, 1, 2, length, DIM, dtype=dtype).unbind())


@pytest.fixture
def compilations():
    """A function that counts the graphs compiled since the test began."""
    before = counters["stats"]["unique_graphs"]
    return lambda: counters["stats"]["unique_graphs"] - before


def test_two_hundred_calls_make_few_programs(compilations):
    """50 lengths in two sizes; a fallback to eager would leave no compiled program behind and miss the budget."""
    before = programs._compiled.cache_info().currsize
    for length in LENGTHS:
        for window in (5, 64, (7, 9), None):
            q, k, v = qkv(length)
            out = flex_swat(q, k, v, window, backend="flex")
        assert_within_budget(out, exact=exact_swat(q, k, v, None), rough=rough_swat(q, k, v, None))
    assert compilations() <= 2
    assert programs._compiled.cache_info().currsize - before <= 2
    assert counters["graph_break"] == {}


def test_fifty_lengths_in_a_callers_compile_make_two_graphs(compilations):
    for length in (100, 200):  # the programs themselves
        flex_swat(*qkv(length), 50, backend="flex")
    inside = compilations()
    compiled = torch.compile(lambda q, k, v: flex_swat(q, k, v, 50, backend="flex"), fullgraph=True)
    for length in LENGTHS:
        q, k, v = qkv(length)
        assert torch.equal(compiled(q, k, v), flex_swat(q, k, v, 50, backend="flex"))
    assert compilations() - inside <= 2 + 2  # the two programs once more, for other dispatch keys


@pytest.mark.parametrize("documents", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_shorter_last_batch_compiles_nothing(documents, compilations):
    """One program for all batches of more than one, and nothing of that on the caller's tensors.

    With documents it is one of test_forward.py's.
    """
    first = None
    for batch in (4, 3, 7, 2):
        q, k, v = torch.randn(batch, 3, 70, 8), torch.randn(batch, 1, 70, 8), torch.randn(batch, 1, 70, 40)
        ids = torch.arange(70).expand(batch, -1) // torch.arange(20, 20 + batch)[:, None] if documents else None
        out = flex_swat(q, k, v, 33, document_ids=ids, backend="flex")
        exact, rough = (f(q, k, v, 33, document_ids=ids) for f in (exact_swat, rough_swat))
        assert_within_budget(out, exact=exact, rough=rough)
        assert not any(vars(x) for x in (q, k, v))
        first = compilations() if first is None else first
    assert compilations() == first <= 1


@pytest.mark.slow
def test_batches_of_a_callers_compile_share_the_program_within(compilations):
    """torch dispatches differently there, and compiles a program once more, not once more for each batch."""
    callers = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: flex_swat(q, k, v, 5, backend="flex"), fullgraph=True, backend=callers)
    for batch in (2, 4, 5, 6):
        compiled(*torch.randn(3, batch, 3, 30, 8).unbind())
    assert callers.frame_count <= 2
    assert compilations() - callers.frame_count <= 2


@pytest.mark.parametrize("terminal", [True, False])
def test_a_compilation_is_told_at_a_terminal(terminal, monkeypatch):
    """Once, when it happens; nowhere else is anything written."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(programs, "attend", lambda inputs, *_: inputs.q)
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(programs, "_compiled", functools.lru_cache(programs._compiled.__wrapped__))
    for length in (60, 61):
        flex_swat(*qkv(length), 7, backend="flex")
    if not terminal:
        assert screen.getvalue() == ""
        return
    assert re.fullmatch(
        r"swat_flex: compiling FlexAttention for up to 128 tokens, 2 heads of 64, float32 … \d+\.\d s\n",
        screen.getvalue(),
    )


def test_what_needs_no_padding_is_not_copied():
    """F.pad with nothing to pad clones."""
    x = torch.randn(1, 2, 2 * BLOCK, 64)
    assert _padded(x, 2) is x
    assert _padded(x, 3).shape == (1, 2, 3 * BLOCK, 64)
    assert _padded(x[..., :8], 2).shape == (1, 2, 2 * BLOCK, 16)


def test_modes_share_a_program_and_leave_nothing_behind(compilations):
    """Infer first, then call again in every other mode: no inference tensor is met outside of inference mode."""
    q, k, v = qkv(90)
    ids = torch.arange(90) // 40
    results = []
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            results.append(flex_swat(q, k, v, 33, backend="flex"))
            flex_swat(q, k, v, 33, document_ids=ids, backend="flex")
    with torch.no_grad():
        results.append(flex_swat(q.requires_grad_(), k, v, 33, backend="flex"))
    assert all(torch.equal(x, results[0]) for x in results)
    assert compilations() <= 2
    assert not any(x.is_inference() for x in results[1:3])


def test_caches_are_bounded():
    assert programs._compiled.cache_info().maxsize == programs.PROGRAMS
    for length in range(1, 2 * KEPT):
        cached_band(Grid(Window.of(4), length, length, 1, 1, torch.device("cpu")), Form())
    assert len(block_lists._bands) <= KEPT


def test_a_band_is_made_once_and_pinned_while_a_graph_is_captured(monkeypatch):
    """A captured graph reads the lists that it met; they must outlive the cache."""
    grid = Grid(Window.of(9), 77, 77, 1, 1, torch.device("cpu"))
    first = cached_band(grid, Form())
    assert cached_band(grid, Form()) is first
    for module in (block_lists, tracing):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    assert cached_band(grid, Form()) is first
    assert block_lists._pinned[grid, Form(), None] is first
    new = Grid(Window.of(9), 78, 78, 1, 1, torch.device("cpu"))
    assert cached_band(new, Form()) is not cached_band(new, Form())  # memory of the graph's own pool


def test_document_lists_are_made_once_for_a_tensor_of_ids():
    grid, ids = Grid(Window.of(200), 300, 300, 3, 3, torch.device("cpu")), torch.arange(300) // 100
    first = cached_band(grid, Form(), ids)
    assert cached_band(grid, Form(), ids) is first
    ids[150:] = 0  # written in place: other documents
    for found, made in zip(cached_band(grid, Form(), ids)[1], band(grid, Form(), ids[None].int())[1], strict=True):
        assert found is made is None or torch.equal(found, made)
    assert cached_band(grid, Form(), ids.clone()) is not cached_band(grid, Form(), ids)


@pytest.mark.parametrize(("per_doubling", "bound"), [(1, 14), (4, 48)])
def test_a_million_lengths_make_few_sizes(per_doubling, bound):
    """The bound that the backend's documentation states, for lengths up to 2^20 tokens."""
    tiles = {padded_blocks(length, per_doubling) for length in range(1, 2**20 + 1, 37)}
    assert len(tiles) <= bound
    for length in (1, 128, 129, 1000, 5000, 2**20):
        padded = padded_blocks(length, per_doubling) * BLOCK
        assert length <= padded <= max(BLOCK, 2 * length if per_doubling == 1 else 1.25 * length + BLOCK)


def test_fake_tensors_are_not_computed():
    with torch._subclasses.FakeTensorMode():
        out = flex_swat(*qkv(70), 10, backend="flex")
        assert out.shape == (1, 2, 70, DIM)
        assert type(out) is not Tensor
    assert torch.isfinite(flex_swat(*qkv(70), 10, backend="flex")).all()


def test_the_operator_follows_the_rules_of_torch_library():
    q, k, v = qkv(60)
    arguments = (q, k, v, torch.zeros(2), None, None, 9, 0, DIM**-0.5, "sigmoid")
    torch.library.opcheck(torch.ops.swat_flex.flex.default, arguments)


def test_autocast_enters_as_in_scaled_dot_product_attention():
    q, k, v = qkv(60)
    with torch.autocast("cpu", torch.bfloat16):
        out = flex_swat(q, k, v, 9, backend="flex")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, flex_swat(q.bfloat16(), k.bfloat16(), v.bfloat16(), 9, backend="flex"))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (1, 2, 0, 8)])
def test_no_batch_or_no_query_gives_an_empty_result(shape):
    q, k = torch.randn(shape), torch.randn(shape[0], 2, 5, 8)
    assert flex_swat(q, k, k, 3, backend="flex").shape == shape


def test_training_on_a_cpu_is_refused():
    q, k, v = qkv(10)
    with pytest.raises(NotImplementedError, match="no backward on a CPU"):
        flex_swat(q.requires_grad_(), k, v, 3, backend="flex")
    with pytest.raises(NotImplementedError, match="no backward on a CPU"):
        flex_swat(q.detach(), k, v, 3, slopes=torch.zeros(2, requires_grad=True), backend="flex")


@pytest.mark.parametrize(
    ("dtype", "activation", "reason"),
    [(torch.float64, "sigmoid", "float64"), (torch.float32, "tanh-sigmoid", "tanh")],
)
def test_what_flex_cannot_do_it_says(dtype, activation, reason):
    with pytest.raises(NotImplementedError, match=reason):
        flex_swat(*qkv(10, dtype), 3, activation=activation, backend="flex")


def test_more_tokens_than_float32_can_count_are_refused():
    k = torch.zeros(1, 1, 1, 1).expand(-1, -1, 2**24 + 1, -1)
    with pytest.raises(NotImplementedError, match=r"2\^24"):
        flex_swat(k[:, :, :1], k, k, 3, backend="flex")


def test_explain_names_the_backend():
    told = explain(*qkv(10), window=3, backend="flex")
    assert told.backend == "flex"
    assert "no backward" in explain(qkv(10)[0].requires_grad_(), *qkv(10)[1:], window=3).others["flex"]


def test_modifiers_compose_with_a_mask_of_the_callers_own():
    from torch.nn.attention.flex_attention import AuxRequest, and_masks, create_block_mask, flex_attention

    q, k, v = qkv(100)
    slopes = torch.tensor([-0.5, 0.25])

    def even(b, h, q_idx, kv_idx):
        return kv_idx % 2 == 0

    block_mask = create_block_mask(and_masks(band_mask(30, 0), even), None, None, 100, 100, device="cpu")
    out, aux = flex_attention(q, k, v, log_sigmoid_score(slopes), block_mask, return_aux=AuxRequest(lse=True))
    i, j = torch.arange(100)[:, None], torch.arange(100)
    logits = q @ k.mT * DIM**-0.5 + slopes[:, None, None] * (i - j)
    visible = (i - j >= 0) & (i - j <= 30) & (j % 2 == 0)
    torch.testing.assert_close(sigmoid_sum(out, aux.lse), (logits.sigmoid() * visible) @ v)


def test_torch_still_has_the_private_api_behind_the_fast_log_sigmoid():
    """The one place of the library that teaches Inductor an operator: it must still lower to inline assembly."""
    from torch._inductor import lowering
    from torch._inductor.ops_handler import OpsHandler

    assert modifiers._teach_inductor()
    for name, asm in modifiers._PTX.items():
        operator = getattr(torch.ops.swat_flex, modifiers._operator_name(name)).default
        assert operator in lowering.lowerings
        assert "'" not in asm
        assert "\n" not in asm
        x = torch.linspace(-30, 30, 50)
        want = torch.nn.functional.logsigmoid(x) if name == "log_sigmoid" else torch.sigmoid(-x)
        assert torch.equal(operator(x), want)
    assert callable(lowering.make_pointwise)
    assert callable(OpsHandler.inline_asm_elementwise)


def test_an_edit_of_the_assembly_makes_another_operator(monkeypatch):
    """Inductor keeps compiled programs by the operators' names: stale code must not meet an edited text."""
    before = modifiers._operator_name("log_sigmoid")
    monkeypatch.setitem(modifiers._PTX, "log_sigmoid", modifiers._PTX["log_sigmoid"] + " ")
    assert modifiers._operator_name("log_sigmoid") != before


def test_the_fast_log_sigmoid_differentiates_itself():
    x = torch.linspace(-9, 9, 20, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(modifiers._FastLogSigmoid.apply, x)
    y = torch.randn(3, 4)
    vmapped = torch.vmap(modifiers._FastLogSigmoid.apply)(y)
    torch.testing.assert_close(vmapped, torch.nn.functional.logsigmoid(y))


def test_the_mark_of_a_constant_result_is_still_torchs():
    """modifiers sets it by name; a torch that moves it must be noticed."""
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert marked._dynamo_marked_constant is modifiers._teach_inductor._dynamo_marked_constant is True


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e4])
@pytest.mark.parametrize("window", [10, 100, (3, 2)], ids=str)
def test_an_unseen_key_changes_no_bit(window, value):
    q, k, v = qkv(200)
    clean = flex_swat(q, k, v, window, backend="flex")
    k = k.clone()
    k[:, :, 100] = value
    out = flex_swat(q, k, v, window, backend="flex")
    left, right = window if isinstance(window, tuple) else (window - 1, 0)
    i = torch.arange(200)
    unseen = (i - 100 > left) | (100 - i > right)
    assert torch.equal(out[:, :, unseen], clean[:, :, unseen])
