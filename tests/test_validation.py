"""Every rule of the door: one row each, the error's type and its words."""

import numpy as np
import pytest
import torch

from swat_flex import explain, flex_swat, naive_swat


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = {"q": t(2, 4, 8, 16), "k": t(2, 2, 8, 16), "v": t(2, 2, 8, 24), "window": 4}
NAMES = "one of 'auto', 'flex', 'triton', 'cpp', 'banded', 'naive'"

RULES = [
    ({"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
    ({"k": np.zeros((2, 2, 8, 16))}, TypeError, "k: expected a torch.Tensor, got ndarray"),
    ({"v": None}, TypeError, "v: expected a torch.Tensor, got NoneType"),
    ({"q": t(4, 8, 16)}, ValueError, "q: expected shape [B, H, L, D], got [4, 8, 16]"),
    ({"k": t(1, 2, 2, 8, 16)}, ValueError, "k: expected shape [B, H, L, D], got [1, 2, 2, 8, 16]"),
    ({"v": t(8)}, ValueError, "v: expected shape [B, H, L, D], got [8]"),
    (
        {"q": t(2, 4, 8, 16, dtype=torch.int64)},
        ValueError,
        "q: expected dtype float32, bfloat16, float16 or float64, got torch.int64",
    ),
    ({"k": t(2, 2, 8, 16, dtype=torch.float16)}, ValueError, "k: expected q's dtype torch.float32, got torch.float16"),
    ({"v": t(2, 2, 8, 24, dtype=torch.float64)}, ValueError, "v: expected q's dtype torch.float32, got torch.float64"),
    ({"k": t(2, 2, 8, 16, device="meta")}, ValueError, "k: expected q's device cpu, got meta"),
    ({"v": t(2, 2, 8, 24, device="meta")}, ValueError, "v: expected q's device cpu, got meta"),
    ({"k": t(3, 2, 8, 16)}, ValueError, "k: expected q's batch size 2, got 3"),
    ({"k": t(2, 2, 8, 20)}, ValueError, "k: expected q's head dimension 16, got 20"),
    ({"v": t(2, 4, 8, 24)}, ValueError, "v: expected k's [B, Hkv, Lk] = [2, 2, 8], got [2, 4, 8]"),
    ({"v": t(2, 2, 9, 24)}, ValueError, "v: expected k's [B, Hkv, Lk] = [2, 2, 8], got [2, 2, 9]"),
    ({"v": t(1, 2, 8, 24)}, ValueError, "v: expected k's [B, Hkv, Lk] = [2, 2, 8], got [1, 2, 8]"),
    (
        {"q": t(2, 4, 8, 257), "k": t(2, 2, 8, 257)},
        ValueError,
        "q: expected a head dimension from 1 to 256, got 257",
    ),
    ({"q": t(2, 4, 8, 0), "k": t(2, 2, 8, 0)}, ValueError, "q: expected a head dimension from 1 to 256, got 0"),
    ({"v": t(2, 2, 8, 0)}, ValueError, "v: expected a head dimension from 1 to 256, got 0"),
    ({"v": t(2, 2, 8, 300)}, ValueError, "v: expected a head dimension from 1 to 256, got 300"),
    ({"k": t(2, 0, 8, 16), "v": t(2, 0, 8, 24)}, ValueError, "k: expected at least 1 head, got 0"),
    ({"q": t(2, 0, 8, 16)}, ValueError, "q: expected a positive multiple of k's 2 heads, got 0"),
    ({"q": t(2, 3, 8, 16)}, ValueError, "q: expected a positive multiple of k's 2 heads, got 3"),
    ({"q": t(2, 4, 9, 16)}, ValueError, "q: expected at most k's 8 tokens, got 9"),
    ({"window": 0}, ValueError, "window: expected at least 1 key per query (its own), got 0"),
    ({"window": -3}, ValueError, "window: expected at least 1 key per query (its own), got -3"),
    ({"window": 4.0}, TypeError, "window: expected an int, a tuple (left, right) or None, got float"),
    ({"window": True}, TypeError, "window: expected an int, a tuple (left, right) or None, got bool"),
    ({"window": [3, 2]}, TypeError, "window: expected an int, a tuple (left, right) or None, got list"),
    ({"window": (3,)}, ValueError, "window: expected a tuple of 2 sides (left, right), got 1 values"),
    ({"window": (3, -1)}, ValueError, "window: expected its right side to be at least 0, got -1"),
    ({"window": (-1, None)}, ValueError, "window: expected its left side to be at least 0, got -1"),
    ({"window": (1.5, 0)}, TypeError, "window: expected an int or None as its left side, got float"),
    ({"window": (0, False)}, TypeError, "window: expected an int or None as its right side, got bool"),
    ({"slopes": "rising"}, ValueError, "slopes: expected one of 'balanced', 'alibi', got 'rising'"),
    (
        {"slopes": 0.5},
        TypeError,
        "slopes: expected 'balanced', 'alibi', a torch.Tensor or None, got float",
    ),
    ({"slopes": t(3)}, ValueError, "slopes: expected shape [Hq] = [4], got [3]"),
    ({"slopes": t(4, 1)}, ValueError, "slopes: expected shape [Hq] = [4], got [4, 1]"),
    (
        {"slopes": t(4, dtype=torch.float64)},
        ValueError,
        "slopes: expected dtype torch.float32 (q is torch.float32), got torch.float64",
    ),
    ({"slopes": t(4, device="meta")}, ValueError, "slopes: expected q's device cpu, got meta"),
    ({"scale": "0.1"}, TypeError, "scale: expected a float or None, got str"),
    ({"scale": torch.tensor(0.1)}, TypeError, "scale: expected a float or None, got Tensor"),
    ({"scale": True}, TypeError, "scale: expected a float or None, got bool"),
    ({"logit_bias": "-2"}, TypeError, "logit_bias: expected a float, a torch.Tensor or None, got str"),
    ({"logit_bias": t()}, ValueError, "logit_bias: expected shape [Hq] = [4], got []"),
    (
        {"logit_bias": t(4, dtype=torch.bfloat16)},
        ValueError,
        "logit_bias: expected dtype torch.float32 (q is torch.float32), got torch.bfloat16",
    ),
    ({"logit_bias": t(4, device="meta")}, ValueError, "logit_bias: expected q's device cpu, got meta"),
    ({"document_ids": [0] * 8}, TypeError, "document_ids: expected a torch.Tensor or None, got list"),
    ({"document_ids": t(8)}, ValueError, "document_ids: expected a signed integer dtype, got torch.float32"),
    (
        {"document_ids": t(8, dtype=torch.bool)},
        ValueError,
        "document_ids: expected a signed integer dtype, got torch.bool",
    ),
    (
        {"document_ids": t(7, dtype=torch.int32)},
        ValueError,
        "document_ids: expected shape [2, 8] or [8], got [7]",
    ),
    (
        {"document_ids": t(1, 8, dtype=torch.int32)},
        ValueError,
        "document_ids: expected shape [2, 8] or [8], got [1, 8]",
    ),
    (
        {"document_ids": t(8, dtype=torch.int32, device="meta")},
        ValueError,
        "document_ids: expected q's device cpu, got meta",
    ),
    ({"activation": 1}, TypeError, "activation: expected a str, got int"),
    (
        {"activation": "relu"},
        ValueError,
        "activation: expected one of 'sigmoid', 'softmax', 'tanh-sigmoid', got 'relu'",
    ),
    ({"backend": None}, TypeError, "backend: expected a str, got NoneType"),
    ({"backend": "cuda"}, ValueError, f"backend: expected {NAMES}, got 'cuda'"),
    (
        {x: t(1, 1, 4, 8, dtype=torch.float64, device="meta") for x in "qkv"},
        ValueError,
        "q: expected float64 on a CPU only (or backend='naive'), got it on meta",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), RULES, ids=[row[2] for row in RULES])
@pytest.mark.parametrize("function", [flex_swat, explain])
def test_a_broken_rule_names_argument_rule_and_value(function, changes, kind, message):
    with pytest.raises(kind) as error:
        function(**GOOD | changes)
    assert type(error.value) is kind
    assert str(error.value) == message


def test_the_unchanged_arguments_are_good():
    assert flex_swat(**GOOD).shape == (2, 4, 8, 24)


def test_the_reference_has_the_same_door():
    with pytest.raises(ValueError, match="window: expected at least 1 key"):
        naive_swat(**GOOD | {"window": 0})


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(8,), (2, 8)])
def test_every_signed_id_dtype_and_shape_is_taken(dtype, shape):
    ids = torch.zeros(shape, dtype=dtype)
    out = flex_swat(**GOOD | {"v": torch.ones(2, 2, 8, 24), "document_ids": ids})
    assert torch.equal(out, flex_swat(**GOOD | {"v": torch.ones(2, 2, 8, 24)}))
