"""The kernels' compiled PTX, executed on the CPU for GPUs that are not here, against the definition in float64.

A run that touches memory it must not, reads what nothing wrote or races ends in a fault: see swat_flex.inspection.ptx.
"""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("numpy")

from executed import Call, assert_near, assert_written_once

from swat_flex import tuned
from swat_flex.backends.triton.config import TritonConfig

FOLDED = {"length": 450, "window": 128}  # the window's edges share tiles of weights
INTERIOR = {"length": 500, "window": 333}  # tiles without masks, and ragged ends


def hold(call, target):
    found, launches = call.execute(target)
    assert set(launches) == {"forward_kernel", "query_gradient_kernel", "key_gradients_kernel"}
    assert_near(found, call.exact(), call.dtype)
    assert_written_once(launches)
    return {name: launched.execution for name, launched in launches.items()}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_defaults_compute_the_definition_and_run_every_instruction(target, head_dim):
    first, second = (hold(Call(head_dim=head_dim, **sizes), target) for sizes in (FOLDED, INTERIOR))
    for kernel in first:
        missed = set(first[kernel].missed) & set(second[kernel].missed)
        print(kernel, len(missed), "of", first[kernel].instructions, "never ran")
        assert len(missed) <= 0.06 * first[kernel].instructions  # the way around the loop over no heads at all


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_defaults_of_every_target(target, head_dim):
    for sizes in (FOLDED, INTERIOR):
        hold(Call(head_dim=head_dim, **sizes), target)


OPTIONS = {
    "float16": ("sm_90", Call(dtype=torch.float16, length=260, window=200)),
    "float32": ("sm_80", Call(dtype=torch.float32, head_dim=32, length=150, window=70)),
    "documents and fewer queries": ("sm_80", Call(window=250, heads=4, kv_heads=2, batch=2, fewer=130, documents=True)),
    "two-sided": ("sm_90", Call(window=(120, 40))),
    "D = 80, as many key heads": ("sm_90", Call(head_dim=80, length=200, window=150, kv_heads=2)),
    "D = 40, causal": ("sm_80", Call(head_dim=40, length=200, window=None, slopes=False, bias=False)),
    "per-head gradients": ("sm_90", Call(window=200, per_head=True)),
    "hardware tanh": ("sm_120", Call(length=200, window=150, activation="tanh-sigmoid")),
}


AT_NIGHT = ("D = 80, as many key heads", "hardware tanh")


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x in AT_NIGHT else ()) for x in OPTIONS])
def test_options(name):
    target, call = OPTIONS[name]
    hold(call, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_on_every_target(name, target):
    hold(OPTIONS[name][1], target)


CONFIGURATIONS = [
    {
        "forward": TritonConfig(64, 64, 4, 3, descriptors=True, pair="queries"),
        "query_gradient": TritonConfig(128, 64, 8, 3, descriptors=True),
        "key_gradients": TritonConfig(64, 128, 8, 2, descriptors=True),
    },
    pytest.param({"forward": TritonConfig(64, 64, 4, 3, pair="keys")}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("configs", CONFIGURATIONS, ids=["descriptors", "pairs of keys"])
def test_tensor_memory_accelerators_and_pairs(configs):
    from swat_flex.backends.triton.op import TUNABLES

    with tuned.using({TUNABLES[kernel].name: config for kernel, config in configs.items()}):
        executions = hold(Call(length=200, window=150), "sm_90")
    assert len(executions) == 3
