"""The operators among torch's own tools: export, ahead-of-time compilation, torch.func, memory, torch's checks."""

import functools
import gc
import resource
import sys

import pytest
import torch

from swat_flex import explain, flex_swat, modifiers, tuned


def inputs(*shape, **options):
    return tuple(torch.randn(shape, **options) for _ in range(3))


class Attention(torch.nn.Module):
    """Every option of the door, learnable slopes and bias among them."""

    def __init__(self, backend="banded"):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.tensor([-0.2, 0.1]))
        self.logit_bias = torch.nn.Parameter(torch.tensor([-1.0, 0.5]))
        self.backend = backend

    def forward(self, q, k, v, document_ids):
        return flex_swat(
            q, k, v, 8, slopes=self.slopes, logit_bias=self.logit_bias, document_ids=document_ids, backend=self.backend
        )


@pytest.mark.parametrize("name", ["log_sigmoid", "sigmoid_of_negative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operators_behind_flex_pass_torchs_own_check(name, dtype):
    x = torch.linspace(-20, 20, 12, dtype=dtype).view(3, 4)
    torch.library.opcheck(getattr(torch.ops.swat_flex, modifiers._operator_name(name)).default, (x,))
    torch.library.opcheck(getattr(torch.ops.swat_flex, modifiers._operator_name(name)).default, (x.T,))


def test_an_exported_program_takes_any_length(tmp_path):
    """Saved, loaded and called with other lengths than it was exported with."""
    length = torch.export.Dim("length", min=2, max=4096)
    model, ids = Attention(), torch.arange(24) // 10
    dynamic = {"q": {2: length}, "k": {2: length}, "v": {2: length}, "document_ids": {0: length}}
    program = torch.export.export(model, (*inputs(1, 2, 24, 8), ids), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2").module()
    for n in (2, 24, 131):
        q, k, v = inputs(1, 2, n, 8)
        ids = torch.arange(n) // 10
        assert torch.equal(loaded(q, k, v, ids), model(q, k, v, ids))


def test_an_exported_program_trains():
    model = Attention()
    args = (*inputs(1, 2, 24, 8), torch.arange(24) // 10)
    exported = torch.export.export(model, args).module()
    gradients = []
    for module in (model, exported):
        parameters = dict(module.named_parameters())
        names = sorted(parameters)
        gradients.append(torch.autograd.grad(module(*args).square().sum(), [parameters[name] for name in names]))
    assert len(gradients[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_a_program_compiled_ahead_of_time_gives_the_same(tmp_path):
    """The package calls the operator, so this library must be imported where it runs."""
    model = Attention().requires_grad_(False)
    args = (*inputs(1, 2, 24, 8), torch.arange(24) // 10)
    program = torch.export.export(model, args)
    package = str(tmp_path / "attention.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(*args), model(*args))


def test_torch_func_vmap_gives_each_call_and_grad_is_refused():
    q, k, v = inputs(3, 1, 2, 20, 8)
    batched = torch.func.vmap(lambda q, k, v: flex_swat(q, k, v, 6))(q, k, v)
    torch.testing.assert_close(batched, torch.stack([flex_swat(*x, 6) for x in zip(q, k, v, strict=True)]))
    with pytest.raises(RuntimeError, match=r"functorch transforms \(vmap, grad"):
        torch.func.grad(lambda q: flex_swat(q, k[0], v[0], 6).sum())(q[0])


@pytest.mark.parametrize("name", ["q", "k", "v", "slopes", "logit_bias"])
def test_forward_mode_is_refused_but_by_naive(name):
    """torch would give a derivative of 0."""
    given = dict(zip("qkv", inputs(1, 2, 20, 8), strict=True), slopes=torch.zeros(2), logit_bias=torch.zeros(2))

    def call(x, backend):
        return flex_swat(**given | {name: x}, window=6, backend=backend)

    tangent = torch.randn_like(given[name])
    for backend in ("auto", "flex", "banded"):
        with pytest.raises(NotImplementedError, match=rf"^{name}: forward-mode .*'naive', got a tangent in backend"):
            torch.func.jvp(functools.partial(call, backend=backend), (given[name],), (tangent,))
    _, derivative = torch.func.jvp(functools.partial(call, backend="naive"), (given[name],), (tangent,))
    step = 1e-3 * tangent
    difference = call(given[name] + step, "auto") - call(given[name] - step, "auto")
    torch.testing.assert_close(derivative, difference / 2e-3, atol=2e-3, rtol=0)


def test_the_gradient_may_be_expanded_over_heads_or_all_of_it():
    """A sum's gradient is one number that every element shares."""
    q, k, v = (x.requires_grad_() for x in (torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)))
    grad = torch.randn(2, 1, 9, 8)
    out = flex_swat(q, k, v, 4)
    for expanded in (grad.expand_as(out), torch.ones(()).expand_as(out), torch.randn(2, 9, 8, 6).permute(0, 3, 1, 2)):
        dense = torch.autograd.grad(out, (q, k, v), expanded.contiguous(), retain_graph=True)
        for a, b in zip(torch.autograd.grad(out, (q, k, v), expanded, retain_graph=True), dense, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(sys.platform == "win32", reason="reads the resident memory of Linux and macOS")
@pytest.mark.xdist_group("memory")
def test_ten_thousand_calls_do_not_grow():
    """Lengths, windows and options change, so that whatever is kept by them would show."""

    def calls(number):
        for n in range(number):
            length = 1 + n % 37
            q = torch.ones(1, 2, length, 4, requires_grad=n % 2 == 0)
            ids = torch.zeros(length, dtype=torch.int32) if n % 3 == 0 else None
            out = flex_swat(q, q, q, 1 + n % 11, slopes="alibi" if n % 5 else "balanced", document_ids=ids)
            if q.requires_grad:
                out.sum().backward()
            explain(q, q, q, 3)
        tuned.refresh()  # it remembers up to tuned.KEPT calls, which are no leak

    calls(1_000)  # what torch keeps after its first calls is not a leak
    gc.collect()
    objects = len(gc.get_objects())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(10_000)
    gc.collect()
    assert len(gc.get_objects()) - objects < 1_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB; 2 kB per call
