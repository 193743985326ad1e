"""`flex` on a GPU, without one: its kernels lowered for a pretend GPU, compiled, counted, interpreted and executed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swat_flex import naive_swat

HERE = Path(__file__).parent
COUNTED = {"batch": 1, "q_heads": 2, "kv_heads": 1, "length": 300, "window": 170, "backward": True}
RUN = {"batch": 1, "q_heads": 2, "kv_heads": 1, "length": 200, "window": 70, "dtype": "float32", "backward": True}
SWITCHES = {
    "contiguous": "BLOCKS_ARE_CONTIGUOUS",
    "rows_safe": "ROWS_GUARANTEED_SAFE",
    "prescale": "PRESCALE_QK",
}
TUNED = {"head_dim": 16, "value_dim": 16, "seed": 3}
CASES = {
    90: {
        "d64": COUNTED | {"head_dim": 64, "value_dim": 64, "dtype": "bfloat16"},
        "d128": COUNTED | {"head_dim": 128, "value_dim": 128, "dtype": "bfloat16"},
        "sigmoid": RUN | {"head_dim": 20, "value_dim": 32, "logit_bias": True},
        "softmax": RUN | {"head_dim": 32, "value_dim": 16, "window": [40, 20], "softmax": True, "seed": 1},
        "documents": RUN | {"head_dim": 16, "value_dim": 16, "documents": True, "seed": 2},
        "batches": RUN | {"head_dim": 16, "value_dim": 16, "documents": True, "batch": 2, "run_batch": 3, "seed": 4},
        "d64_batches": COUNTED | {"head_dim": 64, "value_dim": 64, "dtype": "bfloat16", "batch": 4},
        "contiguous": RUN | TUNED | {"config": {"contiguous": True, "mask_block": 64}},
        "rows_safe": RUN | TUNED | {"config": {"rows_safe": True}, "window": [None, 0], "length": 256, "softmax": True},
        "prescale": RUN | TUNED | {"config": {"prescale": True}, "slopes": False, "softmax": True, "window": 70},
        "tma": COUNTED
        | {"head_dim": 64, "value_dim": 64, "dtype": "bfloat16"}
        | {"config": {"tma": True, "backward_tma": True}},
    },
    80: {
        "d64": COUNTED | {"head_dim": 64, "value_dim": 64, "dtype": "bfloat16"},
        "d128": COUNTED | {"head_dim": 128, "value_dim": 128, "dtype": "bfloat16"},
    },
}
# A case takes seconds to lower and up to a minute to interpret; every run takes these, and nights take all.
IN_EVERY_RUN = {(90, "d64"), (90, "sigmoid")}


def each(cases):
    """The cases as pytest parameters, those of the nights marked."""
    return [
        pytest.param(*case, marks=() if case[:2] in IN_EVERY_RUN else pytest.mark.slow, id="-".join(map(str, case)))
        for case in cases
    ]


# (instructions per thread in the widest of the loops that multiply, bytes spilled), as measured.
RECORDED = {
    (90, "d64", "forward"): (1553, 0),
    (90, "d64", "backward"): (680, 0),
    (90, "d64_batches", "forward"): (1553, 0),
    (90, "d64_batches", "backward"): (680, 0),
    (90, "d128", "forward"): (891, 0),
    (90, "d128", "backward"): (745, 0),
    (80, "d64", "forward"): (1693, 16),
    (80, "d64", "backward"): (708, 0),
    (80, "d128", "forward"): (1032, 0),
    (80, "d128", "backward"): (823, 0),
}
SMALLEST_SHARED_MEMORY = 101376  # bytes a block may use on sm_86, sm_89 and sm_120


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the pretend GPU")


@pytest.fixture(scope="module")
def lowered(tmp_path_factory, request):
    """{(capability, case): what lower.py wrote}, each capability lowered once, in a process of its own."""
    from triton import knobs

    if not Path(knobs.nvidia.cuobjdump.path).exists():
        pytest.skip("this build of triton brings no cuobjdump")
    scratch = tmp_path_factory.mktemp("lowered")
    found = {}
    at_night = any("slow" in item.keywords for item in request.session.items)
    for capability, all_cases in CASES.items():
        cases = {name: case for name, case in all_cases.items() if at_night or (capability, name) in IN_EVERY_RUN}
        if not cases:
            continue
        folder = scratch / str(capability)
        folder.mkdir()
        (folder / "cases.json").write_text(json.dumps(cases))
        run("lower.py", str(capability), str(folder / "cases.json"), str(folder))
        for name in cases:
            found[capability, name] = folder / f"{name}.pt"
    return found


def run(script: str, *arguments: str) -> str:
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def kernel(lowered: dict, capability: int, case: str, which: str) -> dict:
    kernels = torch.load(lowered[capability, case], weights_only=False)["kernels"]
    (found,) = (k for name, k in kernels.items() if ("backward" in name) == (which == "backward"))
    return found


@pytest.mark.parametrize(("capability", "case", "which"), each(RECORDED))
def test_kernels_fit_the_hardware(lowered, capability, case, which):
    """No double precision, no more shared memory than the smallest GPU has, no more spilled or executed than ever."""
    found = kernel(lowered, capability, case, which)
    instructions, spilled = RECORDED[capability, case, which]
    assert not found["float64"]
    assert found["shared"] <= SMALLEST_SHARED_MEMORY
    assert found["stack"] <= spilled
    assert max(loop["total"] for loop in found["loops"]) <= 1.05 * instructions


def test_the_unmasked_loop_of_the_forward_is_lean(lowered):
    """128 × 64 pairs on 4 warps: 64 per thread; F.logsigmoid would need 3,763 instructions and spill."""
    loop = min(kernel(lowered, 90, "d64", "forward")["loops"], key=lambda loop: loop["total"])
    assert loop["total"] <= 1300
    assert loop["MUFU.LG2"] == 64


def test_float32_multiplies_in_ieee_float32(lowered):
    for module in torch.load(lowered[90, "sigmoid"], weights_only=False)["modules"]:
        precisions = set(re.findall(r"FLOAT32_PRECISION : tl.constexpr = '(\w+)'", module["source"]))
        assert precisions == {"ieee"}


@pytest.mark.slow
def test_fifty_lengths_in_a_callers_compile_make_two_graphs(tmp_path):
    """Forward and backward through documents, lowered for the caller: the first length, then symbols."""
    done = run("trace.py", str(tmp_path))
    assert json.loads(done)["graphs"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_tensor_memory_accelerators_load_where_a_configuration_asks_for_them(lowered, which):
    """UTMALDG is the instruction; the default configuration has none."""
    for case, wanted in (("tma", True), ("d64", False)):
        assert ("UTMALDG" in kernel(lowered, 90, case, which)["opcodes"]) is wanted
    assert kernel(lowered, 90, "tma", which)["shared"] <= 227 * 1024


INTERPRETED = ("sigmoid", "softmax", "documents", "batches", "contiguous", "rows_safe", "prescale")


@pytest.mark.slow  # executed as machine code in every run: see below
@pytest.mark.parametrize(("capability", "name"), [(90, name) for name in INTERPRETED])
def test_generated_kernels_compute_the_definition(lowered, capability, name):
    """Forward and every gradient, executed in the Triton interpreter at a length that is no multiple of a tile.

    `batches` was compiled for two sequences and is executed with three.
    """
    path = lowered[capability, name]
    run("interpret.py", str(path))
    found = torch.load(path.with_suffix(".out.pt"), weights_only=False)
    case = CASES[capability][name]
    if "config" in case:
        switch = next(iter(case["config"]))
        sources = "".join(module["source"] for module in torch.load(path, weights_only=False)["modules"])
        assert re.search(rf"{SWITCHES[switch]} : tl.constexpr = True", sources)
    for of, error in errors(path, case, found).items():
        assert error < 1e-6, f"{of}: relative error {error:.1e}"


def errors(path: Path, case: dict, found: dict) -> dict[str, float]:
    """Relative errors (2-norm) of results by name."""
    inputs, length = torch.load(path, weights_only=False)["inputs"], case["length"]

    def real(name: str, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :length] if name in ("q", "k", "v", "out", "grad") else x[:, 0]

    for name in {"slopes", "logit_bias"} & set(found):  # one per query, added up by autograd outside of the program
        found[name] = found[name].sum(1, keepdim=True)

    wanted = {x: real(x, inputs[x]).double().requires_grad_() for x in found if x != "out"}
    ids = inputs["document_ids"]
    ids = None if ids is None else ids[:, :length]
    rest = {"document_ids": ids, "slopes": wanted.get("slopes"), "logit_bias": wanted.get("logit_bias")}
    window = tuple(case["window"]) if isinstance(case["window"], list) else case["window"]
    activation = "softmax" if case.get("softmax") else "sigmoid"
    out = naive_swat(wanted["q"], wanted["k"], wanted["v"], window, activation=activation, **rest)
    gradients = torch.autograd.grad(out, list(wanted.values()), real("grad", inputs["grad"]).double())
    exact = {"out": out, **dict(zip(wanted, gradients, strict=True))}
    for of in exact:
        assert real(of, found[of]).isfinite().all(), of
    return {of: float((real(of, found[of]) - want).norm() / want.norm()) for of, want in exact.items()}


EXECUTED = [(90, "d64"), (90, "d128"), (80, "d64"), (80, "d128")]


@pytest.mark.parametrize(("capability", "name"), each(EXECUTED))
def test_compiled_kernels_compute_the_definition(lowered, capability, name):
    """Forward and every gradient, executed as machine code for the GPU: no fault, every element written once.

    But for the gradient of the slopes, which the kernel adds to atomically. The error is twice half a unit:
    FlexAttention's result is rounded to bfloat16 before it is multiplied by exp(logsumexp).
    """
    path = lowered[capability, name]
    run("execute.py", f"sm_{capability}", str(path))
    ran = torch.load(path.with_suffix(".ran.pt"), weights_only=False)
    for of, error in errors(path, CASES[capability][name], ran["results"]).items():
        print(f"{of}: relative error {error:.1e}")
        assert error < torch.finfo(torch.bfloat16).eps, of
    templates = [execution for name, execution in ran["launches"] if "tem_fused" in name]
    assert len(templates) == 2
    for execution in templates:
        assert not execution.undefined
        results = {name: x for name, x in execution.writes.items() if x.any() and not name.startswith("in_")}
        assert len(results) == (2 if "arg_LSE" in results else 3)  # out and its logsumexp; dq, dk and dv
        assert all((writes == 1).all() for writes in results.values()), list(results)
