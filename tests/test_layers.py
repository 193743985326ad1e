"""Who may import whom, what `swat_flex` exports, and that importing it does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import swat_flex

ROOT = Path(swat_flex.__file__).parent

# Each room and the rooms it may import. `backends` stands for every backend, none of which imports another; what all
# their operators have in common is `backends.operator`.
ARROWS = {
    "tracing": set(),
    "window": set(),
    "positions": {"tracing"},
    "problem": {"tracing", "window"},
    "operands": {"problem", "tracing", "window"},
    "validation": {"operands", "positions", "problem", "window"},
    "tuned": {"problem"},
    "reference": {"operands", "problem", "validation"},
    "modifiers": {"window", "positions"},
    "backends": {"modifiers", "operands", "positions", "problem", "tracing", "tuned", "window"},
    "dispatch": {"backends", "operands", "problem", "reference", "tuned"},
    "api": {"dispatch", "operands", "problem", "tuned", "validation"},
    "decode": {"validation", "problem", "backends", "api"},
    "nn": {"api", "decode", "positions", "distributed", "tracing"},
    "training": {"nn", "distributed"},
    "distributed": {"api", "dispatch", "operands", "problem", "validation", "window"},
    "hf": {"nn", "api", "decode", "positions"},
    "plot": {"window", "positions"},
    "inspection": {"backends", "problem", "window"},
    "testing": {
        "api",
        "decode",
        "distributed",
        "inspection",
        "operands",
        "problem",
        "reference",
        "validation",
        "window",
    },
    "tuning": {"api", "backends", "dispatch", "inspection", "operands", "positions", "problem", "testing", "tuned"}
    | {"validation", "window"},
}
PUBLIC = {room for room in ARROWS if room not in ("backends", "validation")}


def rooms():
    """(room, file) of every module of the package."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield parts[0], path


def imported(path):
    """(room, full name) of every swat_flex module a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "swat_flex":
            for alias in node.names:
                parts = [*node.module.split("."), alias.name]
                yield parts[1], ".".join(parts)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("swat_flex."):
                    yield alias.name.split(".")[1], alias.name


@pytest.mark.parametrize(("room", "path"), list(rooms()), ids=lambda x: str(x).removeprefix(str(ROOT)))
def test_a_room_imports_only_along_the_arrows(room, path):
    if room == "__init__":
        return  # re-exports: see below
    allowed = PUBLIC | {"cli", "__version__", "explain"} if room in ("cli", "__main__") else ARROWS[room] | {room}
    for other, name in imported(path):
        assert other in allowed, f"{path.relative_to(ROOT)} imports {name}"
        if room == other == "backends":
            own = path.relative_to(ROOT).with_suffix("").parts[1]
            assert name.split(".")[2] in (own, "operator"), f"{path.relative_to(ROOT)} imports {name}"


def test_the_arrows_make_no_circle():
    order, left = [], dict(ARROWS)
    while left:
        free = [room for room, needs in left.items() if needs <= set(order)]
        assert free, f"a circle among {sorted(left)}"
        order += free
        left = {room: needs for room, needs in left.items() if room not in free}


def test_autotune_knows_nothing_of_attention():
    for path in (ROOT.parent / "autotune").rglob("*.py"):
        names = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert not any(name.split(".")[0] in ("swat_flex", "perf") for name in names), path


def test_init_only_re_exports():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    kinds = {type(node) for node in tree.body[1:]}
    assert kinds == {ast.ImportFrom, ast.Assign}
    assert sorted(swat_flex.__all__) == list(swat_flex.__all__)
    assert all(hasattr(swat_flex, name) for name in swat_flex.__all__)


def test_import_touches_no_device_no_variable_and_no_optional_package():
    """Seen from a process of its own: what the import of torch reads does not count, what ours reads does."""
    program = """
import os, sys
import torch
import torch.utils.flop_counter
read = []
class Watched(type(os.environ)):
    def __getitem__(self, key):
        read.append(key)
        return super().__getitem__(key)
environ = os.environ
os.environ = Watched(environ._data, environ.encodekey, environ.decodekey, environ.encodevalue, environ.decodevalue)
before = set(sys.modules)
import swat_flex
assert not torch.cuda.is_initialized()
optional = {"hypothesis", "matplotlib", "transformers", "rich", "typer", "triton", "numpy", "autotune", "platformdirs"}
print(read, sorted(optional & (set(sys.modules) - before)))
"""
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert output.strip() == "[] []"


def test_every_public_name_has_a_docstring_with_its_shapes():
    for name in swat_flex.__all__:
        assert getattr(swat_flex, name).__doc__, name
