"""Candidates for a GPU that is not here: what their machine code rules out, and what tuning asks of the backends there.

Nothing of this runs on a GPU here; the searches' own behaviour is tested on the CPU and with fakes.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from swat_flex.backends.flex import FlexConfig
from swat_flex.backends.flex.config import rows_are_safe
from swat_flex.backends.flex.op import FLEX
from swat_flex.backends.triton import TritonConfig, configuration
from swat_flex.problem import SwatProblem
from swat_flex.tuning.plan import jobs_of, plan
from swat_flex.tuning.spec import Spec
from swat_flex.window import Window

H100_SHARED = 232448  # bytes a block may use on sm_90


def problem(window=512, needs_grad=True, **changes):
    made = SwatProblem.of_self_attention(8, 4096, 64, torch.bfloat16, "cuda", window)
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


def test_a_gpu_problem_asks_for_every_search_of_ours():
    spec = Spec(problem(), "cuda:0")
    kernels = ["triton.forward", "triton.query_gradient", "triton.key_gradients"]
    assert [job.tunable for job in jobs_of(spec, "auto", 60)] == [*kernels, "flex", "backend"]
    assert [job.tunable for job in jobs_of(spec, "triton", 60)] == kernels
    assert [job.tunable for job in jobs_of(spec, "banded", 60)] == ["banded.forward", "banded.backward"]
    inference = Spec(problem(needs_grad=False), "cuda:0")
    assert [job.tunable for job in jobs_of(inference, "auto", 60)] == ["triton.forward", "flex", "backend"]
    softmax = Spec(problem(activation="softmax"), "cuda:0")
    assert [job.tunable for job in jobs_of(softmax, "auto", 60)] == ["flex"]  # beside it banded alone
    for item in plan(jobs_of(spec, "auto", 60), 60):  # without touching the device
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
    causal, window = Window.of(None), Window.of(512)
    assert config.fitting(causal, 256, 256, False, True) == config
    assert config.fitting(Window.of(256 + 1), 256, 256, False, True).rows_safe  # reaches to the first key
    assert config.fitting(window, 1024, 1024, False, True) == dataclasses.replace(config, rows_safe=False)
    assert not config.fitting(causal, 256, 256, False, False).rows_safe
    assert not config.fitting(causal, 250, 256, False, True).rows_safe
    assert not config.fitting(causal, 128, 200, False, True).rows_safe
    assert not config.fitting(causal, 256, 256, True, True).contiguous
    assert not rows_are_safe(Window.of((None, 5)), 256, 256)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flex_spaces_begin_with_the_default_and_hold_no_invalid_tile(dim, dtype):
    of = problem(head_dim=dim, value_dim=dim, dtype=dtype)
    space = FLEX.space(of)
    assert space.default == FLEX.default(of)
    assert all(config.mask_block % config.block_m == 0 for config in space.candidates)
    assert FLEX.bucket(of)["backward"] is True
