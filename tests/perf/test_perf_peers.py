"""Each adapter sees exactly `window` keys, by the peer's own convention; what cannot run here skips with its reason."""

from dataclasses import replace

import pytest
import torch
from perf_fakes import CPU, TINY

from perf.cases import layer, step
from perf.peers import ATTENTION, DECODING, pytorch
from perf.peers.packages import cudnn_left_bound, fla_window, local_bucket
from perf.peers.pytorch import (
    FlashAttention2,
    FlashAttention2Alibi,
    FlexSoftmax,
    band_mask,
    flash_slopes,
    flash_window,
)
from swat_flex import balanced_alibi_slopes
from swat_flex.window import Window

EQUAL_HEADS = layer("tiny, equal heads", "for peers without grouped queries", (2, 2), 150, 48)
WINDOWS = (1, 2, 48, 150, 200)

# Which pairs each peer keeps, as its own sources say it, for what our translation hands it. i, j: query and key.
CONVENTIONS = {
    # flash.h: max(0, i - window_size_left) <= j < i + 1 + window_size_right
    "FlashAttention-2": lambda i, j, w: (j >= i - flash_window(w)[0]) & (j <= i + flash_window(w)[1]),
    # cudnn_frontend, sliding_window_mask: column + left_bound > row, and causal
    "cuDNN": lambda i, j, w: (j + cudnn_left_bound(w) > i) & (j <= i),
    # fla.ops.attn.naive: masked where row - col >= window_size, and causal
    "fla": lambda i, j, w: ~(i - j >= fla_window(w)) & (j <= i),
    # local_attention: masked where i < j or i > j + window_size · look_backward
    "local-attention": lambda i, j, w: ~((i < j) | (i > j + local_bucket(w))),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("peer", CONVENTIONS)
def test_a_translated_window_keeps_the_keys_that_ours_does(peer, window):
    i, j = torch.arange(150)[:, None], torch.arange(150)
    assert torch.equal(CONVENTIONS[peer](i, j, window), Window.of(window).sees(i - j))


def test_flash_attention_subtracts_what_we_add():
    slopes = balanced_alibi_slopes(4)
    assert torch.equal(-flash_slopes(slopes) * 7.0, slopes * 7.0)


def test_the_band_mask_ends_where_the_last_key_is():
    mask = band_mask(replace(TINY, q_len=3), CPU)
    assert mask.sum(1).tolist() == [48, 48, 48]
    assert mask[-1].nonzero().flatten().tolist() == list(range(150 - 48, 150))


def rows_that_see(peer, case, key, device):
    """Query rows that change when one key's value does: all other values are 0, all weights positive."""
    q, k, v = case.tensors(device)
    q, k, v = q * 0.1, k * 0.1, torch.zeros_like(v)
    v[:, :, key] = 1.0
    if peer.tokens_first:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    with torch.no_grad():
        out = peer.prepare(case, q, k, v)()
    seen = (out != 0).all(-1).all(1).all(0)  # in every batch, head and channel
    assert torch.equal(seen, (out != 0).any(-1).any(1).any(0)), "heads or rows of a batch disagree"
    return seen.nonzero().flatten().tolist()


def case_for(peer, case, device):
    """The case, or the one of equal heads; skips with the peer's reason."""
    reason = peer.available(device)
    if reason is not None:
        pytest.skip(f"{peer.name}: {reason}")
    for candidate in (case, replace(EQUAL_HEADS, dtype=case.dtype)):
        reason = peer.supports(candidate, device, "forward")
        if reason is None:
            return candidate
    return pytest.skip(f"{peer.name}: {reason}")


def sees_exactly_its_window(peer, case, device):
    window = Window.of(peer.definition(case).window)
    for key in (0, 61, case.kv_len - 1):
        first = case.kv_len - case.q_len
        i = torch.arange(first, case.kv_len)
        assert rows_that_see(peer, case, key, device) == window.sees(i - key).nonzero().flatten().tolist(), f"key {key}"


COMPILED = ("swat flex", "FlexAttention softmax")  # for seconds


@pytest.mark.parametrize(
    "peer",
    [pytest.param(peer, marks=pytest.mark.slow if peer.name in COMPILED else (), id=peer.name) for peer in ATTENTION],
)
def test_an_adapter_sees_exactly_window_keys(peer):
    case = case_for(peer, TINY, CPU)
    sees_exactly_its_window(peer, case, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("peer", ATTENTION, ids=lambda peer: peer.name)
def test_an_adapter_sees_exactly_window_keys_on_a_gpu(peer):
    device = torch.device("cuda", 0)
    case = case_for(peer, replace(TINY, head_dim=64, dtype="bfloat16"), device)
    sees_exactly_its_window(peer, case, device)


STEPPING = [peer for peer in DECODING if peer.name != "swat flex"]  # compiled above; nothing of its own here


@pytest.mark.parametrize("peer", STEPPING, ids=lambda peer: peer.name)
def test_a_decoding_adapter_sees_exactly_window_keys(peer):
    case = step("tiny step", "one query", 2, 48, (4, 2), head_dim=16, dtype="float32")
    reason = peer.available(CPU) or peer.supports(case, CPU, "forward")
    if reason is not None:
        pytest.skip(f"{peer.name}: {reason}")
    seen = [key for key in range(case.kv_len) if rows_that_see(peer, case, key, CPU)]
    assert seen == list(range(case.kv_len - 48, case.kv_len))


@pytest.mark.parametrize("peer", [FlashAttention2(), FlashAttention2Alibi()], ids=lambda peer: peer.name)
def test_torch_s_flash_attention_takes_what_its_adapter_hands_it(peer):
    """Names and shapes alone, without a kernel: its window and slopes are keywords that a torch might rename."""
    case = replace(TINY, head_dim=64, dtype="bfloat16")
    q, k, v = (x.to("meta").requires_grad_() for x in case.tensors(CPU))
    out = peer.prepare(case, q, k, v)()
    assert out.shape == q.shape
    if peer.supports(case, CPU, "both") is None:
        assert [g.shape for g in torch.autograd.grad(out, (q, k, v), out)] == [q.shape, k.shape, v.shape]


def test_flex_attentions_softmax_makes_its_block_mask_once(monkeypatch):
    """Before it is timed, as ours are: `flex` takes its block lists from a cache."""
    from torch.nn.attention import flex_attention

    made, make = [], flex_attention.create_block_mask
    monkeypatch.setattr(flex_attention, "create_block_mask", lambda *a, **o: made.append(make(*a, **o)) or made[-1])
    monkeypatch.setattr(pytorch, "_own_flex_attention", lambda: lambda q, k, v, block_mask, **_: block_mask)
    run = FlexSoftmax().prepare(TINY, *TINY.tensors(CPU))
    assert run() is run() is made[0]
    assert len(made) == 1


def test_a_peer_that_is_not_installed_says_so():
    class Absent(type(ATTENTION[0])):
        package = "no_such_package.inner"

    assert Absent("banded").available(CPU) == "not installed"


@pytest.mark.parametrize("peer", ATTENTION, ids=lambda peer: peer.name)
def test_every_peer_answers_for_every_case(peer):
    """A reason or none, never an exception: whatever is installed here."""
    for case in (TINY, EQUAL_HEADS, replace(TINY, q_len=1), replace(TINY, window=1)):
        answer = peer.available(CPU) or peer.supports(case, CPU, "both")
        assert answer is None or answer
