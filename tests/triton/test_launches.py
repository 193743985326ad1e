"""What the operator really hands to Triton, specialised and compiled for GPUs that are not here; nothing is launched.

`test_compiled.py` writes the kernels' signatures down; here Triton derives them from the arguments of a call: lengths
and strides of 1, a single head, expanded and misaligned tensors, descriptors.
"""

import dataclasses

import pytest
import torch
from cases import swat_case
from sampling import sampled

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from swat_flex.backends.triton import config as configs
from swat_flex.backends.triton import offline, op
from swat_flex.backends.triton.config import KERNELS, TritonConfig, configurations
from swat_flex.backends.triton.offline import compile_kernel
from swat_flex.inspection import inspect_kernel
from swat_flex.operands import Operands
from swat_flex.problem import Problem
from swat_flex.window import Window


class Pretend:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """Compile what a launch would run, and keep it: `(call, capability)` to Triton's compiled kernels."""

    def compile_calls(call, capability=90):
        kernels = []
        monkeypatch.setattr(driver, "_active", Pretend(capability))
        monkeypatch.setattr(op, "target_of", lambda device: f"sm_{capability}")
        monkeypatch.setattr(
            triton.JITFunction,
            "__getitem__",
            lambda self, grid: lambda *a, **k: kernels.append(self.run(*a, grid=grid, warmup=True, **k)),
        )
        call()
        return kernels

    return compile_calls


def both_directions(case):
    """A call of the operator's implementation, forward and backward, on tensors of the CPU."""
    options = case.options()
    q, k, v = case.tensors()
    vectors = (options["slopes"], options.get("logit_bias"), options.get("document_ids"))
    operands = Operands(q, k, v, *vectors, Window.of(case.window), 0.125, "sigmoid")

    def call():
        op._forward(operands)
        op._backward(case.gradient(), operands, case.logit_bias != "none")

    return call


CASES = [
    swat_case(130, (20, None), 3, 40, 24, "bfloat16", layout="sliced", documents="packed", logit_bias="tensor"),
    swat_case(1, 1, 1, 1, dtype="bfloat16", kv_heads=1),
    swat_case(129, 64, 1, 64, dtype="bfloat16", kv_heads=1, layout="expanded heads"),
    swat_case(96, None, 4, 128, dtype="float16", layout="transposed", documents="padded", batch=2, fewer=40),
    swat_case(33, 5, 2, 16, 40, dtype="float32", logit_bias="tensor"),
]


@pytest.mark.parametrize("case", sampled(CASES, 5))
def test_the_arguments_of_a_call_compile(case, compiled):
    forward, query_gradient, key_gradients = compiled(both_directions(case))
    names = [kernel.metadata.name for kernel in (forward, query_gradient, key_gradients)]
    assert names == ["forward_kernel", "query_gradient_kernel", "key_gradients_kernel"]
    assert not any(inspect_kernel(kernel).has_float64 for kernel in (forward, query_gradient, key_gradients))


@pytest.mark.parametrize("fields", [{}, {"descriptors": True, "stages": 1}], ids=str)
@pytest.mark.parametrize("case", [
    swat_case(144, 64, 1, 16, dtype="float16", kv_heads=16, documents="anyhow", logit_bias="tensor"),
    swat_case(129, 64, 3, 64, dtype="bfloat16", kv_heads=1, documents="anyhow"),
    swat_case(33, 5, 1, 40, 16, dtype="float32", kv_heads=1, logit_bias="tensor"),
], ids=str)  # fmt: skip
def test_offline_compilation_is_what_a_launch_compiles(case, fields, compiled, monkeypatch):
    """The numbers' divisibility included; else a tuner would compile its candidates twice. Nothing is compiled here."""
    asked = []

    def ask(kernel, options, *source):
        asked.append((triton.compiler.ASTSource(kernel, *source).hash(), options))

    monkeypatch.setattr(triton.JITFunction, "_do_compile",
                        lambda self, key, signature, device, constants, options, attributes, warmup:
                        ask(self, options, signature, constants, attributes))  # fmt: skip
    monkeypatch.setattr(
        offline, "compile_launch", lambda launch, target: ask(launch.kernel, *offline.specialised(launch, target))
    )
    default = op.configurations
    for room in (op, offline):
        monkeypatch.setattr(
            room, "configurations", lambda *a: tuple(dataclasses.replace(c, **fields) for c in default(*a))
        )
    compiled(both_directions(case))
    biased = case.logit_bias != "none"
    made = Problem.of_self_attention(case.q_heads, case.length, case.head_dim, case.torch_dtype, "cuda", case.window)
    changes = {"kv_heads": case.kv_heads, "value_dim": case.value_dim, "has_logit_bias": biased}
    problem = dataclasses.replace(made, has_documents=case.documents != "none", **changes)
    for name in KERNELS:
        compile_kernel(name, problem, "sm_90", per_head=biased)
    assert len(asked) == 6
    assert asked[:3] == asked[3:]


@pytest.mark.parametrize(("head_dim", "most"), [(64, 2), (40, 2)])
def test_lengths_and_batches_make_two_programs_of_a_kernel(head_dim, most, monkeypatch):
    """Lengths that 16 divides, and the others: the numbers of docs/tuning.md. None is compiled here."""
    keys = []
    monkeypatch.setattr(offline, "compile_launch", lambda *launch: keys.append(str(offline.specialised(*launch)[1:])))
    for length in (*range(1025, 3000, 41), *range(1040, 3000, 160)):
        for batch in (1, 3, 16):
            made = Problem.of_self_attention(8, length, head_dim, torch.bfloat16, "cuda", 1024)
            compile_kernel("forward", dataclasses.replace(made, batch=batch), "sm_90")
    assert len(set(keys)) <= most


def descriptors(kernel):
    """How many the kernel takes, after checking that the accelerator loads with them and only with them."""
    loads = [i for i in inspect_kernel(kernel).instructions if i.opcode.startswith("UTMALDG")]
    taken = len(kernel.metadata.tensordesc_meta or ())
    assert bool(loads) == bool(taken)
    return taken


def described(*call):
    return [TritonConfig(c.block_m, c.block_n, c.warps, c.stages, True) for c in configurations(*call)]


@pytest.mark.parametrize(
    ("case", "forward", "key_gradients"),
    sampled(
        [
            (swat_case(200, 64, 1, 20, 16, dtype="bfloat16"), 1, 1),  # rows of 40 bytes
            (swat_case(200, 64, 2, 64, dtype="bfloat16", layout="transposed"), 2, 2),
            (swat_case(200, 64, 1, 80, 24, dtype="float16", logit_bias="tensor"), 2, 2),
            (swat_case(200, 64, 1, 16, dtype="bfloat16", layout="expanded heads"), 0, 1),  # strides of 0
            (swat_case(200, 64, 1, 16, dtype="bfloat16", layout="sliced"), 0, 1),  # last axis of stride 2; not grad's
        ],
        5,
    ),
)
def test_descriptors_are_used_where_a_tensor_qualifies(case, forward, key_gradients, compiled, monkeypatch):
    monkeypatch.setattr(op, "configurations", described)
    assert [descriptors(k) for k in compiled(both_directions(case))] == [forward, forward, key_gradients]


@pytest.mark.slow
def test_a_target_without_the_accelerator_drops_the_fields(compiled, monkeypatch):
    monkeypatch.setattr(op, "configurations", described)
    call = both_directions(swat_case(200, 64, 1, 16, dtype="bfloat16"))
    assert [descriptors(kernel) for kernel in compiled(call, capability=80)] == [0, 0, 0]


def test_a_configuration_runs_where_the_target_has_what_it_asks_for():
    plain, tma = TritonConfig(64, 64, 4, 2), TritonConfig(64, 64, 4, 2, descriptors=True)
    specialised = TritonConfig(64, 64, 4, 2, warp_specialize=True)
    for target in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        assert configs.runs_on("forward", plain, target)
        assert configs.runs_on("key_gradients", tma, target) == (target in ("sm_90", "sm_100", "sm_120"))
        assert configs.runs_on("forward", specialised, target) == (target == "sm_100")
        assert not configs.runs_on("query_gradient", specialised, target)
    assert not configs.runs_on("forward", TritonConfig(512, 64, 8, 1, descriptors=True), "sm_90")


def test_the_hardware_tanh_is_refused_on_amd(monkeypatch):
    made = Problem.of_self_attention(2, 64, 64, torch.bfloat16, "cuda", 32)
    tanh = dataclasses.replace(made, activation="tanh-sigmoid")
    assert op.supports(tanh) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert op.supports(made) is None
    assert "instruction of NVIDIA's" in op.supports(tanh)
