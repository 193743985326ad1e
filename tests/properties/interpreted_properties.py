"""The laws on the triton kernels in Triton's interpreter: see test_triton_properties.py, which starts this file."""

import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from laws import LAWS

from swat_flex import flex_swat
from swat_flex.testing.strategies import cases_for

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton_properties.py"


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_triton(law):
    @settings(max_examples=max(1, settings().max_examples // 8))
    @given(case=cases_for("triton").filter(lambda case: case.length <= 70))
    def holds(case):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's of infinities
            law(case, "triton")

    holds()


@pytest.mark.parametrize(("dtype", "block"), [(torch.float32, 32), (torch.float16, 128)])
def test_packed_documents_at_tile_boundaries_are_separate_calls_to_the_bit(dtype, block):
    q, k, v = torch.randn(3, 1, 1, 2 * block, 16, dtype=torch.float64).to(dtype).unbind()
    ids = torch.arange(2 * block) // block
    packed = flex_swat(q, k, v, 40, document_ids=ids, backend="triton")
    for part in (slice(0, block), slice(block, None)):
        alone = flex_swat(q[:, :, part], k[:, :, part], v[:, :, part], 40, backend="triton")
        assert torch.equal(packed[:, :, part], alone)
