"""Which backend a problem gets, on devices that need not be here."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools

import pytest
import torch

from swat_flex import dispatch, validation
from swat_flex.backends import flex, triton
from swat_flex.problem import Problem

FLAGS = ("has_slopes", "has_logit_bias", "has_documents", "needs_grad", "traced")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def problem(dtype=torch.bfloat16, window=64, dim=64, **changes):
    return dataclasses.replace(Problem.of_self_attention(4, 300, dim, dtype, "cuda", window), **changes)


@needs_triton
def test_auto_on_cuda_never_falls_to_banded_where_triton_supports_the_call():
    taken = set()
    for dtype, activation, dim, learns in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ("sigmoid", "softmax", "tanh-sigmoid"), (1, 256), (False, True)
    ):
        for flags in itertools.product((False, True), repeat=len(FLAGS)):
            of = problem(dtype, dim=dim, activation=activation, **dict(zip(FLAGS, flags, strict=True)))
            of = dataclasses.replace(of, learns_bias=learns and of.needs_grad and of.has_slopes)
            if triton.supports(of) is None:
                taken.add(dispatch.choose(of).backend)
    assert taken == {"flex", "triton"}
    assert dispatch.choose(problem(torch.float16)).backend == "triton"  # training
    assert dispatch.choose(problem()).backend == "flex"


@needs_triton
def test_learnable_slopes_on_cuda_go_where_their_gradients_repeat():
    learning = problem(learns_bias=True)
    assert flex.supports(learning) is None
    assert dispatch.choose(learning).backend == "triton"
    assert "repeat to the bit" in dispatch.choose(learning).why
    assert dispatch.choose(dataclasses.replace(learning, activation="softmax")).backend == "flex"
    assert dispatch.choose(learning, "flex").backend == "flex"


def test_a_problem_tells_learnable_slopes():
    q, k, v = torch.randn(3, 1, 2, 8, 4)
    still, learnt = torch.zeros(2), torch.zeros(2, requires_grad=True)

    def of(slopes=still, logit_bias=None, q=q):
        return validation.resolve(q, k, v, 3, slopes, None, logit_bias, None, "sigmoid", "auto").problem()

    assert not of().learns_bias
    assert (of(q=q.clone().requires_grad_()).needs_grad, of(q=q.clone().requires_grad_()).learns_bias) == (True, False)
    for made in (of(learnt), of(logit_bias=learnt)):
        assert made.learns_bias
        assert made.needs_grad
    with torch.no_grad():
        assert not of(learnt).learns_bias
    assert dispatch.BACKEND.bucket(of(learnt)) != dispatch.BACKEND.bucket(of(q=q.clone().requires_grad_()))
    with torch.device("meta"):  # nothing of this reads a value
        q, k, v = torch.empty(3, 1, 2, 8, 4)
        assert of(torch.empty(2, requires_grad=True), q=q).learns_bias
