"""`SwatTransformer` and its training on meshes (data, context) against one process."""

import functools
import subprocess
import sys

import models
import pytest
import torch
from ranks import run

from swat_flex.testing.budget import ENOUGH, assert_within_budget
from swat_flex.training.checkpoint import load_checkpoint

MESHES = [(1, 2), (1, 3), (2, 1), (2, 2), (1, 4)]


@functools.cache
def alone(dtype):
    return models.alone(dtype)


@pytest.mark.parametrize(("data", "context"), MESHES)
def test_loss_and_gradients_are_those_of_one_process(data, context):
    for found in run(models.model_on, data * context, torch.float64, data, context, context == 3, False):
        assert found.keys() == alone(torch.float64).keys()
        for name, expected in alone(torch.float64).items():
            assert (found[name] - expected).abs().max() <= 1e-12 * max(expected.abs().max(), 1), name


def test_float32_is_within_budget_of_float64():
    exact, rough = alone(torch.float64), alone(torch.float32)
    for found in run(models.model_on, 4, torch.float32, 2, 2, False, False):
        for name, expected in exact.items():
            if expected.numel() >= ENOUGH:
                assert_within_budget(found[name], exact=expected, rough=rough[name], name=name)


def test_compiled_blocks_break_their_graph_at_the_exchange_and_agree():
    for found in run(models.model_on, 2, torch.float64, 1, 2, False, True):
        for name, expected in alone(torch.float64).items():
            assert (found[name] - expected).abs().max() <= 1e-12 * max(expected.abs().max(), 1), name


def test_logits_are_those_of_one_process_and_ranks_that_differ_are_told():
    tokens, _, ids = models.rows()
    expected = models.model_of(torch.float64)(tokens, ids)
    logits, errors = zip(*run(models.logits_on, 3), strict=True)
    assert (torch.cat(logits, 1) - expected).abs().max() <= 1e-12
    assert set(errors) == {"batch: expected the same on every rank of the mesh, got [3, 4, 4]"}
