"""Lower `flex` for a pretend GPU, in a process of its own: `python lower.py CAPABILITY CASES.json SCRATCH`.

For each case it writes SCRATCH/<name>.pt: the generated modules of forward and backward, the names of their inputs, the
inputs themselves (on the CPU), and of each attention kernel the registers, spills and instructions.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pretend_cuda

CAPABILITY, CASES, SCRATCH = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
pretend_cuda.load_stubs(SCRATCH)

import types  # noqa: E402  (the rest needs the pretend GPU)

import sass  # noqa: E402
import sympy  # noqa: E402
import torch  # noqa: E402
import torch._functorch.config  # noqa: E402
import torch._inductor.config  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.ir import NoneAsConstantBuffer, ShapeAsConstantBuffer  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from swat_flex.backends.flex import config as configs  # noqa: E402
from swat_flex.backends.flex import op, programs  # noqa: E402
from swat_flex.backends.flex.blocks import BLOCK, BlockLists, Bounds, Form, Grid, band, padded_blocks  # noqa: E402
from swat_flex.backends.flex.config import FlexConfig  # noqa: E402
from swat_flex.window import Window  # noqa: E402

torch._inductor.config.force_disable_caches = True


BATCHED = {"q", "k", "v", "document_ids", *(f"blocks.{name}" for name in BlockLists._fields)}


class Recorder:
    """Stands in for the compiled modules: keeps their source, and the names of what they are called with."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.alive: list[torch.Tensor] = []
        self.modules: list[dict[str, object]] = []

    def name(self, x: torch.Tensor, name: str) -> torch.Tensor:
        self.names[id(x)] = name
        self.alive.append(x)
        return x

    def called(self, x: torch.Tensor | int) -> str:
        """The name of what a module takes or returns; of numbers there is one, a free batch."""
        return "batch" if isinstance(x, int) else self.names.get(id(x), "?")

    def compile_to_module(self, graph: GraphLowering) -> types.SimpleNamespace:
        module: dict[str, object] = {"source": graph.codegen()[0].value}
        self.modules.append(module)
        inputs = list(graph.graph_inputs)

        def number(symbols: object) -> int:
            return int(sympy.sympify(symbols).subs(graph.sizevars.shape_env.backed_var_to_val))

        def call(args: list[torch.Tensor | int]) -> list[torch.Tensor | int | None]:
            module["inputs"] = [self.called(x) for x in args]
            results = []
            for i, node in enumerate(graph.graph_outputs):
                if isinstance(node, NoneAsConstantBuffer):
                    results.append(None)
                elif isinstance(node, ShapeAsConstantBuffer):
                    results.append(number(node.expr))
                elif node.get_name() in inputs:
                    results.append(args[inputs.index(node.get_name())])
                else:
                    size, stride = ([number(n) for n in which()] for which in (node.get_size, node.get_stride))
                    made = torch.empty_strided(size, stride, dtype=node.get_dtype(), device="cuda")
                    results.append(self.name(made, f"{len(self.modules) - 1}.{i}"))
            module["outputs"] = [None if x is None else self.called(x) for x in results]
            return results

        return types.SimpleNamespace(call=call, __file__="/dev/null", key="key", runner=None)


def configured(case: dict) -> FlexConfig:
    """The case's own configuration, or the default."""
    default = configs.choose(case["head_dim"], case["value_dim"], getattr(torch, case["dtype"]))
    config = dataclasses.replace(default, **case.get("config", {}))
    assert config.is_valid()
    return config


def arguments(case: dict) -> dict[str, torch.Tensor]:
    """Random q, k, v, slopes and the band of a case, padded as the backend pads them, on the CPU."""
    generator = torch.Generator().manual_seed(case.get("seed", 0))
    dtype = getattr(torch, case["dtype"])
    batch, heads, kv_heads, length = case["batch"], case["q_heads"], case["kv_heads"], case["length"]
    tiles = padded_blocks(length, per_doubling=4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def padded(count: int, width: int) -> torch.Tensor:
        x = torch.zeros(batch, count, tiles * BLOCK, width, dtype=dtype)
        x[:, :, :length] = draw(batch, count, length, width)
        return x

    made = {
        "q": padded(heads, case["head_dim"]),
        "k": padded(kv_heads, case["head_dim"]),
        "v": padded(kv_heads, case["value_dim"]),
        "slopes": None,
        "logit_bias": draw(heads)[:, None].repeat(1, tiles * BLOCK) if case.get("logit_bias") else None,
    }
    if case.get("slopes", True):
        made["slopes"] = op.by_query((-draw(heads).abs()).requires_grad_(case["backward"]), tiles * BLOCK).detach()
    config, sides = configured(case), case["window"]
    window = Window(*sides) if isinstance(sides, list) else Window.of(sides)
    ids = torch.arange(length).expand(batch, -1) // 60 - 1 if case.get("documents") else None
    made["document_ids"] = None if ids is None else F.pad(ids, (0, tiles * BLOCK - length), value=-1)
    columns = tiles * BLOCK // config.mask_block
    grid = Grid(window, length, length, columns, columns, torch.device("cpu"), config.mask_block)
    bounds, blocks = band(grid, Form(backward=case["backward"], merged=config.contiguous), ids)
    made |= {f"bounds.{n}": x for n, x in bounds._asdict().items()}
    made |= {f"blocks.{n}": x for n, x in blocks._asdict().items() if x is not None}
    grad = torch.zeros(*made["q"].shape[:3], case["value_dim"], dtype=dtype)
    grad[:, :, :length] = draw(batch, heads, length, case["value_dim"])
    return made | {"grad": grad}


def lower(case: dict) -> dict[str, object]:
    recorder = Recorder()
    real = arguments(case)
    differentiable = ("q", "k", "v", "slopes", "logit_bias") if case["backward"] else ()
    GraphLowering.compile_to_module = lambda graph: recorder.compile_to_module(graph)  # noqa: PLW0108  (not a method)
    torch._dynamo.reset()
    config = configured(case)
    with FakeTensorMode():
        fake = {}
        for name, x in real.items():
            if x is not None:
                made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                fake[name] = recorder.name(made.requires_grad_(name in differentiable), name)
                if x.shape[:1] == (case["batch"],) and case["batch"] > 1 and name in BATCHED:
                    torch._dynamo.mark_dynamic(made, 0)  # as the backend does
        tensors = [fake.get(name) for name in ("q", "k", "v", "slopes", "logit_bias", "document_ids")]
        bounds = Bounds(*(fake[f"bounds.{n}"] for n in Bounds._fields))
        blocks = BlockLists(*(fake.get(f"blocks.{n}") for n in BlockLists._fields))
        scale = case["head_dim"] ** -0.5
        program = torch.compile(programs.attend, fullgraph=True, dynamic=False)
        with torch.set_grad_enabled(case["backward"]):
            settings = programs.Settings(scale, case.get("softmax", False), config)
            out = program(programs.Inputs(*tensors), bounds, blocks, settings)
        wanted = [name for name in differentiable if name in fake]
        gradients = torch.autograd.grad(out, [fake[name] for name in wanted], fake["grad"]) if wanted else ()
    found = {name: recorder.names.get(id(x), "?") for name, x in zip(wanted, gradients, strict=True)}
    kernels = {}
    for module in recorder.modules:
        for name, source in sass.kernels(module["source"]):
            if "tem_fused" in name:
                kernels[name] = sass.measure(name, source, CAPABILITY)
    names = {"out": recorder.names.get(id(out), "?"), "gradients": found}
    batch = case.get("run_batch", case["batch"])
    inputs = arguments(case | {"batch": batch}) | {"batch": batch}
    return {"modules": recorder.modules, "kernels": kernels, "inputs": inputs, **names}


if __name__ == "__main__":
    pretend_cuda.install(CAPABILITY)
    for name, case in json.loads(CASES.read_text()).items():
        torch.save(lower(case), SCRATCH / f"{name}.pt")
