"""The model: what it computes, what it ignores, and the ways PyTorch treats a module."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from swat_flex import SwatAttention, SwatConfig, SwatTransformer, apply_rope, naive_swat, unit_logit_bias
from swat_flex.nn import chunked_cross_entropy
from swat_flex.positions import slopes_of

SMALL: dict[str, Any] = {"vocab_size": 31, "hidden_size": 24, "layers": 2, "heads": 4, "kv_heads": 2, "window": 7}
OURS: dict[str, Any] = {"learnable_slopes": False, "learnable_logit_bias": False}  # the recipe, nothing learnt
RICH: dict[str, Any] = {
    **SMALL, "window": (5, 9), "qk_norm": True, "learnable_slopes": True, "learnable_logit_bias": True,
    "logit_bias": "-log(window)", "slopes": "3:1", "tie_embeddings": True,
}  # fmt: skip


def model_of(**options: Any) -> SwatTransformer:
    return SwatTransformer(SwatConfig(**{**SMALL, "init_std": 0.2, **options}))


def text(batch: int, length: int) -> torch.Tensor:
    return torch.randint(31, (batch, length))


@pytest.mark.parametrize("root_norm", [True, False])
def test_attention_is_the_definition_between_its_projections(root_norm):
    config = SwatConfig(**{**RICH, "init_std": 0.3, "root_norm": root_norm})
    layer = SwatAttention(config, 1).double()
    x = torch.randn(2, 19, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = (f(x).view(2, 19, -1, 6).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    norms = (layer.query_norm.weight, layer.key_norm.weight)
    q, k = (apply_rope(F.rms_norm(y, (6,), norm, eps=1e-5)) for y, norm in zip((q, k), norms, strict=True))
    expected = naive_swat(q, k, v, 9, slopes=layer.slopes, logit_bias=layer.logit_bias)
    if root_norm:
        expected = expected / expected.square().mean(-1, keepdim=True).sqrt().sqrt()
    expected = layer.out(expected.transpose(1, 2).reshape(2, 19, 24))
    grad = torch.randn_like(expected)
    names, leaves = zip(("x", x), *layer.named_parameters(), strict=True)
    for name, a, b in zip(
        names, torch.autograd.grad(layer(x), leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(layer(x), expected)


def test_the_root_of_the_size_is_kept_in_any_dtype_and_nothing_stays_nothing():
    """A head's output 4 times as large is written 2 times as large; tiny and huge ones are finite."""
    layer = SwatAttention(SwatConfig(**SMALL, learnable_slopes=False, learnable_logit_bias=False))
    size = 1.0
    layer.attend = lambda q, k, v, *rest, **options: (size * torch.ones_like(q)).requires_grad_()
    x = torch.randn(1, 3, 24)
    once = layer(x)
    size = 4.0
    torch.testing.assert_close(layer(x), 2 * once)
    for dtype, sizes in ((torch.float16, (0.0, 6e-8, 6e4)), (torch.bfloat16, (0.0, 1e-38, 3e18))):
        layer = layer.to(dtype)
        for size in sizes:
            given = (size * torch.ones(1, 3, 24, dtype=dtype)).requires_grad_()
            layer.attend = lambda *_, given=given, **__: given.view(1, 3, 4, 6).transpose(1, 2)
            written = layer(x.to(dtype))
            (grad,) = torch.autograd.grad(written.sum(), given)
            assert written.isfinite().all()
            assert grad.isfinite().all()
            assert size or not written.any()


def test_under_autocast_normed_queries_and_keys_have_the_values_dtype():
    """A cache keeps keys and values of one dtype; the norm's float32 weight makes float32 of neither."""
    layer, given = SwatAttention(SwatConfig(**SMALL)), []
    layer.attend = lambda q, k, v, *rest, **options: given.extend((q.dtype, k.dtype, v.dtype)) or q
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(1, 9, 24))
    assert given == [torch.bfloat16] * 3


@pytest.mark.parametrize(
    "options", [{}, RICH, {"activation": "softmax", "window": None}], ids=["recipe", "rich", "full"]
)
def test_a_document_and_padding_change_nothing_but_their_own_rows(options):
    model = model_of(**options)
    tokens = text(1, 23)
    alone = [model(part) for part in tokens.split([9, 14], dim=1)]
    ids = torch.tensor([3] * 9 + [1] * 14)
    torch.testing.assert_close(model(tokens, ids), torch.cat(alone, 1), atol=2e-5, rtol=1e-4)
    mask = torch.arange(23)[None] >= 9
    torch.testing.assert_close(model(tokens, mask=mask)[:, 9:], alone[1], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        model(tokens, ids, mask=mask)[:, 9:], model(tokens, mask=mask)[:, 9:], atol=2e-5, rtol=1e-4
    )


def test_no_token_reads_a_later_one_nor_one_beyond_the_layers_reach():
    model = model_of()
    tokens = text(1, 40)
    moved = tokens.clone()
    moved[0, 20] = (moved[0, 20] + 1) % 31
    changed = (model(tokens) != model(moved)).any(-1)[0].nonzero()[:, 0]
    assert changed.min() == 20
    assert changed.max() <= 20 + 2 * 6  # receptive field 1 + (window − 1) · layers


@pytest.mark.parametrize("bias", ["-log(window)", "unit"])
def test_initialisation_is_as_documented(bias):
    config = SwatConfig(
        **{**RICH, "logit_bias": bias, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "layers": 2}
    )
    model = SwatTransformer(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / 2 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        elif name.endswith("slopes"):
            assert torch.equal(p, config.head_slopes())
        elif name.endswith("logit_bias"):
            layer = int(name.split(".")[1])
            window = (5, 9)[layer]
            slopes = config.head_slopes()
            unit = unit_logit_bias(slopes, window, 1 / 16)
            expected = unit if bias == "unit" else torch.full((4,), -math.log(window))
            assert torch.equal(p, expected), name
        else:
            assert torch.equal(p, torch.ones_like(p)), name


def test_a_model_made_on_the_meta_device_is_the_same_once_drawn():
    config = SwatConfig(**RICH)
    with torch.device("meta"):
        model = SwatTransformer(config)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    draws = []
    for fresh in (model, SwatTransformer(config)):
        torch.manual_seed(5)
        fresh.reset_parameters()
        draws.append(fresh)
    assert model.head.weight is model.embedding.weight
    tokens = text(1, 12)
    assert torch.equal(draws[0](tokens), draws[1](tokens))


def test_copies_pickles_and_strict_state_dicts_compute_the_same():
    model, tokens = model_of(**RICH), text(2, 12)
    expected = model(tokens)
    other = model_of(**RICH)
    other.load_state_dict(model.state_dict(), strict=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert twin.head.weight is twin.embedding.weight
        assert torch.equal(twin(tokens), expected)
    assert not list(model.buffers())


def test_a_cast_model_keeps_its_slopes_exact():
    q = torch.empty(1, dtype=torch.bfloat16)
    for name in ("alibi", "balanced", "1:3"):
        model = model_of(slopes=name, **OURS).bfloat16()
        slopes, bias = model.blocks[0].attention._bias(q)
        slopes = slopes_of(slopes, 4, q)
        assert torch.equal(slopes, model.config.head_slopes())
        assert torch.equal(bias, unit_logit_bias(slopes, 7, 1 / 16))
        again = model.blocks[1].attention._bias(q)
        assert slopes_of(again[0], 4, q) is slopes  # made once for all layers
        assert again[1] is bias
    assert model(text(1, 12)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="recipe"),
        pytest.param(OURS, id="nothing learnt", marks=pytest.mark.slow),
        pytest.param(RICH, id="rich"),
    ],
)
def test_gradient_checkpointing_and_compile_change_no_gradient(options):
    model, tokens = model_of(**options), text(2, 21)
    targets, ids = text(2, 21), torch.arange(21) // 8

    def gradients(run: Any) -> list[torch.Tensor]:
        model.zero_grad()
        run(tokens, ids, targets=targets).backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(model)
    model.gradient_checkpointing = True
    assert all(map(torch.equal, gradients(model), plain))
    model.gradient_checkpointing = False
    for a, b in zip(gradients(torch.compile(model, backend="aot_eager", fullgraph=True)), plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 100])
def test_chunked_cross_entropy_is_cross_entropy(chunk):
    hidden = torch.randn(1, 37, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(13, (1, 37))
    targets[0, ::5] = -100
    leaves = (hidden, weight)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=chunk)
    expected = F.cross_entropy((hidden @ weight.T)[0], targets[0])
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_the_loss_never_holds_all_logits():
    """The largest tensor that any operator returns, forward and backward, is a chunk's logits or a parameter."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden, weight = torch.randn(1, 400, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with Watch():
        chunked_cross_entropy(hidden, weight, torch.randint(50, (1, 400)), chunk=20).backward()
    assert largest == 400 * 8  # hidden and its gradient; the chunk's 20 · 50 logits are fewer, all 400 · 50 more


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda m: m(torch.zeros(3, dtype=torch.int64)), ["tokens", "[B, L]", "[3]"]),
        (lambda m: m(torch.zeros(1, 3)), ["tokens", "int", "float32"]),
        (lambda m: m(text(1, 3), cache=m.new_cache(1)[:1]), ["cache", "2", "got 1"]),
        (lambda m: m(text(1, 3), torch.zeros(3, dtype=torch.int32), m.new_cache(1)), ["document_ids", "None"]),
        (lambda m: m.loss(text(1, 3), text(1, 4)), ["targets", "[1, 3]", "[1, 4]"]),
    ],
)
def test_wrong_arguments_are_refused(call, parts):
    with pytest.raises(ValueError, match=parts[0]) as caught:
        call(model_of())
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_sharded_model_is_drawn_as_a_whole_one():
    """FSDP2 shards parameters before they are drawn: meta device, `fully_shard`, `to_empty`, `reset_parameters`."""
    config = SwatConfig(**SMALL)
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())  # no other process is needed
    try:
        with torch.device("meta"):
            model = SwatTransformer(config)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        model.to_empty(device="cpu")
        model.reset_parameters()
        attention = model.blocks[0].attention
        parts = [attention.slopes.to_local().tolist(), attention.logit_bias.to_local().tolist()]
    finally:
        dist.destroy_process_group()
    whole = SwatTransformer(config).blocks[0].attention
    assert parts == [whole.slopes[:2].tolist(), whole.logit_bias[:2].tolist()]
