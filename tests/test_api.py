"""The door: what it promises beyond the numbers."""

import copy
import re
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend  # private: counts graphs; torch has no public counter
from torch.utils.flop_counter import FlopCounterMode

from swat_flex import explain, flex_swat, naive_swat
from swat_flex import positions as positions_module
from swat_flex.backends.cpp import library
from swat_flex.window import Window

ON_CPU = "banded" if library.trouble() else "cpp"


def inputs(*shape, dtype=torch.float32, requires_grad=False):
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for _ in range(3))


def test_the_default_is_balanced_slopes_and_a_scale_of_one_over_root_d():
    q, k, v = inputs(1, 4, 33, 16)
    slopes = torch.tensor([-0.5, -0.25, 0.5, 0.25])
    assert torch.equal(flex_swat(q, k, v, 8), flex_swat(q, k, v, 8, slopes=slopes, scale=0.25))


@pytest.mark.parametrize("backend", ["auto", "banded", "naive"])
def test_a_float_logit_bias_is_one_number_per_head(backend):
    q, k, v = inputs(1, 4, 33, 16)
    number = flex_swat(q, k, v, 8, logit_bias=-2.0, backend=backend)
    vector = flex_swat(q, k, v, 8, logit_bias=torch.full((4,), -2.0), backend=backend)
    torch.testing.assert_close(number, vector)
    assert not torch.allclose(number, flex_swat(q, k, v, 8, backend=backend))


@pytest.mark.parametrize("shape", [(0, 4, 8, 16), (2, 4, 0, 16)])
@pytest.mark.parametrize("backend", ["banded", "naive"])
def test_no_batch_or_no_query_gives_an_empty_result_with_gradients(shape, backend):
    batch, heads, length, dim = shape
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(batch, heads, max(length, 3), dim, requires_grad=True)
    out = flex_swat(q, k, k, 4, backend=backend)
    assert out.shape == shape
    out.sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q))
    assert torch.equal(k.grad, torch.zeros_like(k))


def layouts():
    b, h, n, d = 2, 4, 9, 16
    return {
        "bhld": torch.randn(b, h, n, d),
        "blhd": torch.randn(b, n, h, d).transpose(1, 2),
        "hbld": torch.randn(h, b, n, d).transpose(0, 1),
        "bhdl": torch.randn(b, h, d, n).transpose(2, 3),
        "sliced": torch.randn(b, h, n + 3, 2 * d)[:, :, 3:, ::2],
        "of qkv": torch.randn(b, n, 3, h, d)[:, :, 1].transpose(1, 2),
    }


@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("value_dim", [16, 5])
def test_output_axes_lie_in_memory_in_qs_order(name, value_dim):
    q = layouts()[name]
    v = torch.randn(2, 4, 9, value_dim)
    out = flex_swat(q, q, v, 4)
    expected = sorted(range(4), key=lambda axis: -q.stride(axis))
    assert sorted(range(4), key=lambda axis: -out.stride(axis)) == expected
    assert out.permute(expected).is_contiguous()
    torch._dynamo.reset()
    fake = torch.compile(flex_swat, backend="aot_eager", fullgraph=True)(q, q, v, 4)
    assert fake.stride() == out.stride()


@pytest.mark.parametrize("backend", ["flex", "triton", "cpp", "banded", "naive"])
def test_a_backend_asked_for_by_name_runs_or_says_why_not(backend):
    q, k, v = inputs(1, 2, 8, 64)  # of a program that tests/flex compiles, too
    reason = explain(q, k, v, 4).others.get(backend, "chosen")
    if reason in ("chosen", "not the choice for this device"):
        assert explain(q, k, v, 4, backend=backend).backend == backend
        torch.testing.assert_close(flex_swat(q, k, v, 4, backend=backend), naive_swat(q, k, v, 4))
    else:
        for function in (flex_swat, explain):
            with pytest.raises(NotImplementedError, match=re.escape(f"backend={backend!r}: {reason}")):
                function(q, k, v, 4, backend=backend)


def test_hardware_tanh_is_refused_where_there_is_none():
    q, k, v = inputs(1, 2, 8, 16)
    for backend in ("auto", "banded", "naive"):
        with pytest.raises(NotImplementedError, match="activation='tanh-sigmoid'"):
            flex_swat(q, k, v, 4, activation="tanh-sigmoid", backend=backend)


def test_explain_says_what_runs_and_why():
    told = explain(*inputs(1, 2, 8, 16), 4)
    assert told.backend == ON_CPU
    assert "CPU" in told.why or "compiler" in told.why
    (configured,) = told.configuration
    assert configured.tunable == f"{ON_CPU}.forward"
    assert configured.configuration.startswith(f"{ON_CPU.capitalize()}Config(block=")
    assert configured.origin == "default"
    assert str(configured) in str(told).splitlines()
    assert set(told.others) == {"flex", "triton", "cpp", "banded", "naive"} - {ON_CPU}
    assert all(told.others.values())
    assert str(told).startswith(f"{ON_CPU}: ")


def test_autocast_is_that_of_scaled_dot_product_attention():
    q, k, v = inputs(1, 2, 65, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flex_swat(q, k.bfloat16(), v, 16)
        assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        assert flex_swat(q.double(), k.double(), v.double(), 16).dtype == torch.float64
    assert torch.equal(out, flex_swat(q.bfloat16(), k.bfloat16(), v.bfloat16(), 16))


def test_autocast_does_not_reach_inside_the_operator():
    """In the backward pass too, which may run inside the user's autocast region."""
    q, k, v = (x.bfloat16().requires_grad_() for x in inputs(1, 2, 65, 16))
    plain = torch.autograd.grad(flex_swat(q, k, v, 16).float().square().sum(), (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(flex_swat(q, k, v, 16).float().square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_float32_products_are_exact_whatever_the_user_allows():
    q, k, v = inputs(1, 8, 640, 64)
    exact = flex_swat(q, k, v, 512)
    try:
        torch.set_float32_matmul_precision("medium")  # bfloat16 products, on processors that have them
        assert torch.equal(flex_swat(q, k, v, 512), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def graphs(function, lengths, requires_grad=False):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for length in lengths:
        q, k, v = inputs(1, 2, length, 16, requires_grad=requires_grad)
        out = compiled(q, k, v)
        torch.testing.assert_close(out, function(q, k, v))
        if requires_grad:
            out.sum().backward()
    return counter.frame_count


@pytest.mark.parametrize("requires_grad", [False, True])
def test_fifty_lengths_make_at_most_three_graphs(requires_grad):
    assert graphs(lambda q, k, v: flex_swat(q, k, v, 64), range(1, 301, 6), requires_grad) <= 3


def test_fifty_lengths_with_every_option_make_at_most_three_graphs():
    bias = torch.randn(2)

    def call(q, k, v):
        ids = torch.arange(k.shape[2]) // 50
        return flex_swat(q, k, v, (30, None), slopes="alibi", logit_bias=bias, document_ids=ids, activation="softmax")

    assert graphs(call, range(1, 51)) <= 3


def test_fewer_queries_than_keys_compile_for_every_pair_of_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: flex_swat(q, k, v, 8), fullgraph=True, backend=counter)
    for q_len, kv_len in [(3, 9), (4, 17), (9, 9), (1, 30), (12, 13)]:
        q, k, v = torch.randn(1, 2, q_len, 8), *torch.randn(2, 1, 2, kv_len, 8)
        torch.testing.assert_close(compiled(q, k, v), flex_swat(q, k, v, 8))
    assert counter.frame_count <= 5


def test_infer_first_then_train():
    """A slopes tensor made in inference mode must not come back in training."""
    positions_module._made.clear()
    q, k, v = inputs(1, 6, 10, 8, requires_grad=True)
    with torch.inference_mode():
        flex_swat(q, k, v, 3)
    flex_swat(q, k, v, 3).sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


def test_a_fake_call_leaves_nothing_fake_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode  # private: what torch.export and compile trace with

    positions_module._made.clear()
    with FakeTensorMode():
        assert flex_swat(*inputs(1, 6, 10, 8), 3).shape == (1, 6, 10, 8)
    assert not positions_module._made
    real = flex_swat(*inputs(1, 6, 10, 8), 3)
    assert type(real) is torch.Tensor
    with FakeTensorMode():  # and a real tensor kept from before does not meet fake ones
        flex_swat(*inputs(1, 6, 10, 8), 3)


def test_the_meta_device_gives_shapes_without_memory():
    q = torch.empty(1, 8, 2**20, 64, device="meta")
    assert flex_swat(q, q, q, 4096).shape == q.shape


def test_a_checkpointed_call_has_the_same_gradients():
    q, k, v = inputs(1, 2, 70, 16, requires_grad=True)
    plain = torch.autograd.grad(flex_swat(q, k, v, 16).square().sum(), (q, k, v))
    out = torch.utils.checkpoint.checkpoint(flex_swat, q, k, v, 16, use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_backward_saves_the_inputs_alone():
    q, k, v = inputs(1, 2, 300, 16, requires_grad=True)
    slopes, ids = torch.randn(2, requires_grad=True), torch.zeros(300, dtype=torch.int32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        flex_swat(q, k, v, 16, slopes=slopes, document_ids=ids, logit_bias=-1.0)
    pointers = {x.data_ptr() for x in (q, k, v, slopes, ids)}
    others = [x for x in saved if x.data_ptr() not in pointers]
    assert sum(x.numel() for x in others) == 2  # the float logit_bias as a vector over the heads


def test_flops_are_those_of_the_visible_pairs():
    q, k, v = inputs(2, 4, 300, 16, requires_grad=True)
    forward = 2 * 2 * 4 * Window.of(64).pairs(300, 300) * (16 + 16)
    with FlopCounterMode(display=False) as counter:
        out = flex_swat(q, k, v, 64)
        assert counter.get_total_flops() == forward
        out.sum().backward()
    assert counter.get_total_flops() == forward * 3.5


def test_a_second_derivative_is_refused_in_words():
    q, k, v = inputs(1, 2, 9, 8, requires_grad=True)
    (dq,) = torch.autograd.grad(flex_swat(q, k, v, 4).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{ON_CPU}_backward"):
        dq.sum().backward()


def test_results_copy_and_threads_do_not_share_state():
    q, k, v = inputs(1, 4, 200, 16)
    expected = flex_swat(q, k, v, 64)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: flex_swat(q, k, v, 64), range(16)))
    assert all(torch.equal(r, expected) for r in results)
    assert torch.equal(copy.deepcopy(expected), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="reads the high-water mark of resident memory")
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("backward", [pytest.param(False, marks=pytest.mark.slow), True])
def test_extra_memory_is_linear_and_small(backward, tmp_path):
    """Beyond inputs and outputs under 37.5 MB for two heads of 65,536 tokens; its process has a peak of its own."""
    import subprocess

    script = tmp_path / "peak.py"
    script.write_text(
        f"""
import resource, torch
from swat_flex import flex_swat
backward = {backward}
q, k, v, grad, *outputs = (torch.ones(1, 2, 65536, 64) for _ in range(8 if backward else 5))
flex_swat(q[:, :, :1024], k[:, :, :1024], v[:, :, :1024], 512)  # what the first call loads is not the operator's
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del outputs  # room for the outputs: the output itself, and the three gradients
if backward:
    [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(flex_swat(q, k, v, 512), (q, k, v), grad)
else:
    out = flex_swat(q, k, v, 512)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    )
    kilobytes = int(subprocess.check_output([sys.executable, str(script)], text=True))
    assert kilobytes < 37_500
