"""Plant a fault: load a backend again with a line of its source replaced, and let `flex_swat` use it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import swat_flex.backends.operator
from swat_flex import dispatch
from swat_flex.backends.cpp import build, library
from swat_flex.operands import Operands

# Modules that took names from a module when they were imported, in the order in which they must be loaded again.
DEPENDENTS = {
    "backends.banded.tiles": ["backends.banded.op"],
    "backends.triton.sigmoid": ["backends.triton." + name for name in ("tiles", "forward", "backward", "op")],
    "backends.triton.tiles": ["backends.triton." + name for name in ("forward", "backward", "op")],
    "backends.triton.forward": ["backends.triton.op"],
    "backends.triton.backward": ["backends.triton.op"],
    "modifiers": ["backends.flex.programs", "backends.flex.op"],
    "backends.flex.programs": ["backends.flex.op"],
    "backends.flex.blocks": ["backends.flex.op"],
}


@dataclass(frozen=True)
class Fault:
    """`old` in the source of `swat_flex.<module>`, for `cpp` in a file of its kernels, becomes `new`."""

    backend: str
    name: str
    module: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.name}"

    @property
    def source(self) -> Path:
        if self.backend == "cpp":
            return build.SOURCES / self.module
        return Path(swat_flex.__file__).parent / f"{self.module.replace('.', '/')}.py"

    def changed(self) -> str:
        """The source with the fault; AssertionError unless it fits in one place."""
        text = self.source.read_text()
        places = text.count(self.old)
        assert places == 1, f"{self}: {places} places hold {self.old!r}"
        return text.replace(self.old, self.new)


@contextlib.contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """`flex_swat` with the fault in its backend, in this process, until the block ends."""
    if fault.backend == "cpp":
        with _built(fault):
            yield
        return
    names = [fault.module, *DEPENDENTS.get(fault.module, [])]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        sources = {name: Path(importlib.import_module(f"swat_flex.{name}").__file__).read_text() for name in names}
        sources[fault.module] = fault.changed()
        with contextlib.ExitStack() as loading:
            _replace(loading, swat_flex.backends.operator, "define", _define)
            _replace(loading, torch.library, "custom_op", _custom_op)
            for name, source in sources.items():
                path = Path(folder) / f"{name}.py"
                path.write_text(source)
                _load(undo, f"swat_flex.{name}", path)
        op = sys.modules[f"swat_flex.backends.{fault.backend}.op"]
        if fault.backend == "flex" and fault.module != "backends.flex.blocks":
            # FlexAttention as it reads, tiles apart: seconds less than compiling it for each fault.
            programs = importlib.import_module("swat_flex.backends.flex.programs")
            _replace(undo, programs, "compiled", lambda *key: programs.attend)
        backend = SimpleNamespace(swat=op.swat, supports=op.supports, tunables=op.tunables)
        undo.callback(dispatch.BACKENDS.__setitem__, fault.backend, dispatch.BACKENDS[fault.backend])
        dispatch.BACKENDS[fault.backend] = backend
        yield


@contextlib.contextmanager
def _built(fault: Fault) -> Iterator[None]:
    """`cpp` with a library of changed kernels, built in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        kernels = Path(shutil.copytree(build.SOURCES, Path(folder) / "kernels"))
        (kernels / fault.module).write_text(fault.changed())
        _replace(undo, build, "SOURCES", kernels)
        _replace(undo, library, "build", lambda: build.build(Path(folder) / "library", (*build.FLAGS, "-O1")))
        library._load.cache_clear()
        undo.callback(library._load.cache_clear)
        assert library.trouble() is None
        yield


def _load(undo: contextlib.ExitStack, full: str, path: Path) -> None:
    """The module `full` from another file, in place of its own."""
    parent, _, last = full.rpartition(".")
    undo.callback(sys.modules.__setitem__, full, sys.modules[full])
    _replace(undo, sys.modules[parent], last, None)
    spec = importlib.util.spec_from_file_location(full, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    setattr(sys.modules[parent], last, module)
    spec.loader.exec_module(module)


def _replace(undo: contextlib.ExitStack, owner: ModuleType, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _define(name: str, forward: Any, backward: Any = None) -> Any:
    """Do what `backends.operator.define` does, without an operator that torch would know by name."""

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs[:6])
            ctx.rest = inputs[6:]
            q, v = inputs[0], inputs[2]
            return forward(Operands(*inputs)) if q.numel() else q.new_empty(*q.shape[:3], v.shape[3])

        @staticmethod
        def backward(ctx, grad):
            per_head = any(ctx.needs_input_grad[3:5])
            if not grad.numel():
                return *(x if x is None else torch.zeros_like(x) for x in ctx.saved_tensors[:5]), *[None] * 4
            *gradients, both = backward(grad, Operands(*ctx.saved_tensors, *ctx.rest), per_head)
            gradients += both.unbind()
            needed = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:5], strict=True))
            return *needed, *[None] * 4

    return lambda operands: Operator.apply(*(getattr(operands, field) for field in Operands.__slots__))


def _custom_op(name: str, **_: Any) -> Any:
    def keep(function):
        function.register_fake = lambda fake: fake
        return function

    return keep
