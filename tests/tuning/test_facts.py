"""Candidates for a GPU that is not here: what their machine code rules out, and what tuning asks of the backends there.

Nothing of this runs on a GPU here; the searches' own behaviour is tested on the CPU and with fakes.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from swat_flex.backends.flex import FlexConfig
from swat_flex.backends.flex.config import rows_are_safe
from swat_flex.backends.flex.op import FLEX
from swat_flex.backends.triton import DECODE, DecodeConfig, TritonConfig, configuration
from swat_flex.problem import Problem
from swat_flex.tuning.plan import jobs_of, plan

H100_SHARED = 232448  # bytes a block may use on sm_90


def problem(window=512, needs_grad=True, **changes):
    made = Problem.of_self_attention(8, 4096, 64, torch.bfloat16, "cuda", window)
    return dataclasses.replace(made, needs_grad=needs_grad, **changes)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (configuration(problem())["forward"], None),
        (TritonConfig(128, 256, 8, 5), "bytes of shared memory"),
        (TritonConfig(128, 128, 4, 1), "spills"),
    ],
    ids=str,
)
def test_machine_code_rules_candidates_out(config, reason):
    pytest.importorskip("triton")
    from swat_flex.tuning.facts import complaint

    found = complaint("forward", problem(), config, "sm_90", H100_SHARED)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("name", ["forward", "decode"])
def test_a_register_that_nothing_writes_rules_a_candidate_out(name, monkeypatch):
    """As Triton leaves them where a piece of assembly takes more elements than a thread holds."""
    pytest.importorskip("triton")
    from swat_flex.tuning import facts

    ptx = ".reg .b32 %r<9>;\nmov.u32 %r1, 0;\nadd.s32 %r2, %r1, %r7;\nst.shared.b32 [%r2], %r8;\n"
    compiled = SimpleNamespace(asm={"ptx": ptx}, metadata=SimpleNamespace(shared=0))
    monkeypatch.setattr(facts, "compile_kernel", lambda *_, **__: compiled)
    monkeypatch.setattr(facts, "compile_decode", lambda *_, **__: compiled)
    of, config = (step(), DecodeConfig(64, 4, 2)) if name == "decode" else (problem(), TritonConfig(64, 64, 4, 2))
    assert facts.complaint(name, of, config, "sm_90", H100_SHARED) == "reads %r7 and 1 more that nothing writes"


def step(window=1024, tokens=1, **changes):
    """Of new tokens against the keys they see."""
    return problem(window, False, q_len=tokens, kv_len=window + tokens - 1, kv_heads=2, **changes)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (DECODE.default(step()), None),
        (DecodeConfig(64, 4, 2, 8), None),
        (DecodeConfig(64, 4, 2, 32), "leaves 16 of 32 splits without a key"),
        (DecodeConfig(128, 4, 5), "bytes of shared memory"),
    ],
    ids=str,
)
def test_machine_code_rules_steps_out(config, reason):
    pytest.importorskip("triton")
    from swat_flex.tuning.facts import complaint

    found = complaint("decode", step(), config, "sm_90", 100_000)
    assert found is None if reason is None else reason in found


def test_a_step_asks_for_the_decode_kernel_alone():
    of = step(tokens=4)
    (item,) = plan(jobs_of(of, "auto", 600, decode=True), 600)  # without touching the device
    assert item.job.tunable == "triton.decode"
    assert item.refusal == ""
    assert 2 <= item.candidates <= item.size
    with pytest.raises(ValueError, match="got 'flex'"):
        jobs_of(of, "flex", 60, decode=True)


def test_steps_of_one_bucket_share_one_space():
    """What one of them measured, all others can run."""
    shared = [step(window, batch=batch) for window, batch in ((1986, 33), (2048, 64), (2000, 50))]
    assert len({str(DECODE.bucket(of)) for of in shared}) == 1
    assert len({DECODE.space(of).candidates for of in shared}) == 1
    for of in (*shared, step(1), step(16, 16), step(64, head_dim=256, dtype=torch.float32)):
        space = DECODE.space(of)
        assert space.default == DECODE.default(of)
        assert all(config.is_valid() for config in space.candidates)
        splits = {config.splits for config in space.candidates}
        assert splits >= {None, 1}
        assert all(2 * DecodeConfig(16, 4, 1, n).empty_splits(of.kv_len) < n for n in splits - {None})
    for wrong in (DecodeConfig(48, 4, 1), DecodeConfig(8, 4, 1), DecodeConfig(64, 3, 1), DecodeConfig(64, 4, 0),
                  DecodeConfig(64, 4, 1, 0)):  # fmt: skip
        assert not wrong.is_valid()


def test_a_gpu_problem_asks_for_every_search_of_ours():
    of = problem()
    kernels = ["triton.forward", "triton.query_gradient", "triton.key_gradients"]
    assert [job.tunable for job in jobs_of(of, "auto", 60)] == [*kernels, "flex", "backend"]
    assert [job.tunable for job in jobs_of(of, "triton", 60)] == kernels
    assert [job.tunable for job in jobs_of(of, "banded", 60)] == ["banded.forward", "banded.backward"]
    inference = problem(needs_grad=False)
    assert [job.tunable for job in jobs_of(inference, "auto", 60)] == ["triton.forward", "flex", "backend"]
    softmax = problem(activation="softmax")
    assert [job.tunable for job in jobs_of(softmax, "auto", 60)] == ["flex"]  # beside it banded alone
    for item in plan(jobs_of(of, "auto", 60), 60):  # without touching the device
        assert item.refusal == ""
        assert 2 <= item.candidates <= item.size


def test_flex_offers_a_switch_only_where_it_is_right():
    def offered(name, **changes):
        return FLEX.choices(problem(**changes))[name]

    assert offered("contiguous") == (False, True)
    assert offered("contiguous", has_documents=True) == (False,)
    assert offered("rows_safe") == (False,)
    assert offered("rows_safe", window=None) == (False,)
    assert offered("rows_safe", window=None, activation="softmax") == (False, True)
    assert offered("rows_safe", window=None, activation="softmax", has_documents=True) == (False,)
    assert offered("prescale") == (False,)
    assert offered("prescale", activation="softmax", has_slopes=False) == (False, True)
    assert len(offered("backward_m")) > 1
    assert len(offered("backward_m", needs_grad=False)) == 1


def test_flex_leaves_a_switch_out_where_lengths_make_it_wrong():
    config = FlexConfig(128, 64, 4, 3, 32, 128, 8, 2, contiguous=True, rows_safe=True)

    def fitting(window, q_len, kv_len, documents=False, activation="softmax"):
        return config.fitting(
            problem(window, q_len=q_len, kv_len=kv_len, has_documents=documents, activation=activation)
        )

    assert fitting(None, 256, 256) == config
    assert fitting(256 + 1, 256, 256).rows_safe  # reaches to the first key
    assert fitting(512, 1024, 1024) == dataclasses.replace(config, rows_safe=False)
    assert not fitting(None, 256, 256, activation="sigmoid").rows_safe
    assert not fitting(None, 250, 256).rows_safe
    assert not fitting(None, 128, 200).rows_safe
    assert not fitting(None, 256, 256, documents=True).contiguous
    assert not rows_are_safe(problem((None, 5), q_len=256, kv_len=256))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex_spaces_begin_with_the_default_and_hold_no_invalid_tile(dim, dtype):
    of = problem(head_dim=dim, value_dim=dim, dtype=dtype)
    space = FLEX.space(of)
    assert space.default == FLEX.default(of)
    assert all(config.mask_block % config.block_m == 0 for config in space.candidates)
    assert FLEX.bucket(of)["backward"] is True
