"""The kernels of `cpp` built for other vectors than this machine's best, emulated for Arm, and under sanitizers.

Each build is a program of its own, which gets a call and gives its tensors back; the rest is what users run.
"""

import ctypes
import dataclasses
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from covering import POISON, hold, hold_to_budget
from test_cpp import CASES, PER_HEAD

from swat_flex import RingCache, flex_swat, swat_decode
from swat_flex.backends.cpp import build, library
from swat_flex.testing.budget import assert_within_budget, exact_swat, rough_swat

pytestmark = [pytest.mark.slow, pytest.mark.skipif(library.trouble() is not None, reason="no C++ compiler")]

KERNELS = ("swat_forward", "swat_backward", "swat_decode")
POINTERS = ("slopes", "logit_bias", "ids", "length", "per_head")
COMMON = [flag for flag in build.FLAGS if flag not in ("-march=native", "-shared", "-fPIC", "-fvisibility=default")]


@dataclasses.dataclass(frozen=True)
class Build:
    """A compiler, its flags, what runs its programs, and the machine that it needs."""

    compiler: str
    flags: tuple[str, ...]
    runner: tuple[str, ...] = ()
    machine: str = "x86_64"


BUILDS = {
    # The text for AVX-512, whose vectors the compiler makes of two where the machine has none so wide.
    "AVX-512": Build("g++", ("-march=native", "-D__AVX512F__", "-D__AVX512BW__", "-Wno-psabi")),
    "AVX2": Build("g++", ("-march=native", "-mno-avx512f")),
    "SSE": Build("g++", ("-march=native", "-mno-avx")),
    "sanitized": Build(
        "g++", ("-march=native", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"), machine=""
    ),
    "NEON": Build("aarch64-linux-gnu-g++", ("-static",), ("qemu-aarch64-static",), machine=""),
}


class Program:
    """`library.run` by a program: each call is a process of its own."""

    def __init__(self, command):
        self.command = command

    def run(self, function, tensors, per_head, **numbers):
        call = library.describe_call(tensors, per_head, **numbers)
        call.threads = 2
        given = tensors | per_head
        storages, parts = [], []
        for name in (*library.TENSORS, *POINTERS):
            x = given.get(name)
            if x is None:
                parts.append((-1).to_bytes(8, "little", signed=True))
                continue
            storage = x.untyped_storage()
            offset = x.data_ptr() - storage.data_ptr()
            if name in library.TENSORS:
                getattr(call, name).data = offset
            else:
                setattr(call, name, offset)
            storages.append(storage)
            parts += [storage.nbytes().to_bytes(8, "little"), ctypes.string_at(storage.data_ptr(), storage.nbytes())]
        sent = KERNELS.index(function).to_bytes(8, "little") + bytes(call) + b"".join(parts)
        done = subprocess.run(self.command, input=sent, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[:3000]
        rest = done.stdout
        for storage in storages:
            ctypes.memmove(storage.data_ptr(), rest[: storage.nbytes()], storage.nbytes())
            rest = rest[storage.nbytes() :]
        assert not rest


@pytest.fixture(scope="module", params=BUILDS)
def program(request, tmp_path_factory):
    made = BUILDS[request.param]
    if made.machine and platform.machine() != made.machine:
        pytest.skip(f"needs {made.machine}, this is {platform.machine()}")
    missing = [name for name in (made.compiler, *made.runner) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: g++, g++-aarch64-linux-gnu, qemu-user-static)")
    path = tmp_path_factory.mktemp("build") / "drive"
    sources = [Path(__file__).with_name("drive.cpp"), *sorted(build.SOURCES.glob("*.cpp"))]
    command = [made.compiler, *COMMON, *made.flags, f"-I{build.SOURCES}", *map(str, sources), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Program([*made.runner, str(path)])


@pytest.fixture(autouse=True)
def run(program, monkeypatch):
    monkeypatch.setattr(library, "run", program.run)


SMALL = [case for case in CASES if case.length <= 129 and case.head_dim <= 80]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_output_and_gradients_are_within_budget(case):
    hold(case, "cpp")


@pytest.mark.parametrize("case", [case for case in PER_HEAD if case.length < 129], ids=str)
def test_gradients_of_slopes_and_logit_bias_are_within_budget(case):
    hold_to_budget(case, "cpp", ("dslopes", "dlogit_bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("group", "tokens", "window", "head_dim", "value_dim"), [(4, 1, 300, 64, 64), (3, 5, 40, 40, 1), (1, 16, 17, 1, 80)]
)
def test_decoding_is_within_budget(group, tokens, window, head_dim, value_dim, dtype):
    batch, heads, length = 3, 2, window + 20
    draw = torch.randn(batch, heads, length, group * head_dim + head_dim + value_dim).to(dtype)
    q, k, v = draw.split([group * head_dim, head_dim, value_dim], -1)
    q = q.unflatten(-1, (group, head_dim)).movedim(3, 2).flatten(1, 2)[:, :, -tokens:]
    cache = RingCache(batch, heads, window, head_dim, value_dim, dtype, queries=tokens)
    cache.append(k, v)
    out = swat_decode(q, cache, backend="cpp")
    exact, rough = (f(q, k, v, window) for f in (exact_swat, rough_swat))
    assert_within_budget(out, exact=exact, rough=rough, window=window)


@pytest.mark.parametrize("value", POISON)
def test_an_unseen_key_changes_no_bit(value):
    q, k, v = torch.randn(3, 1, 2, 100, 16).unbind()
    clean = flex_swat(q, k, v, 20, backend="cpp")
    k[:, :, 50] = value
    out = flex_swat(q, k, v, 20, backend="cpp")
    i = torch.arange(100)
    unseen = (i < 50) | (i >= 70)
    assert torch.equal(out[:, :, unseen], clean[:, :, unseen])
    assert not torch.equal(out[:, :, ~unseen], clean[:, :, ~unseen])
