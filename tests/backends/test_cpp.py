"""`cpp` against the specification over a pairwise covering; locality, threads; and its library, however it is found."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import exact_of, swat_case
from covering import POISON, covering, covering_per_head, hold, hold_to_budget, sampled

from swat_flex import explain, flex_swat, tuned
from swat_flex.backends.cpp import CppConfig, library
from swat_flex.backends.cpp.build import FLAGS, BuildError, build

pytestmark = pytest.mark.skipif(library.trouble() is not None, reason="no C++ compiler")

LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 129, 1000, 1025]
WINDOWS = [1, 2, 6, 63, 64, 65, 128, 129, "L", "L+5", (3, 2), (None, 4), (0, 70), None]
CASES = list(covering(LENGTHS, WINDOWS))
PER_HEAD = list(covering_per_head())


@pytest.mark.parametrize("case", sampled(CASES, long=1000, every=4))
def test_output_and_gradients_are_within_budget(case):
    hold(case, "cpp")


@pytest.mark.parametrize("case", sampled(PER_HEAD, long=129, every=4))
def test_gradients_of_slopes_and_logit_bias_are_within_budget(case):
    hold_to_budget(case, "cpp", ("dslopes", "dlogit_bias"))


CUTS = [CppConfig(16, 6), CppConfig(48, 48), CppConfig(64, 96), CppConfig(192, 192)]


@pytest.mark.parametrize("window", [1, 70, 1500, None, (5, 60), (1300, None)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_cut_gives_the_same_result(window, dtype):
    """Blocks, tiles, chunks of the backward and their margins: none may show."""
    more = {"documents": "padded", "fewer": 600, "logit_bias": "tensor", "batch": 2, "kv_heads": 1}
    case = swat_case(1700, window, 2, 8, 5, dtype, "transposed", **more)
    exact = exact_of(case)
    for config in CUTS:
        with tuned.using({"cpp.forward": config, "cpp.backward": config}):
            actual = case.call("cpp")
        for name, expected in exact.items():
            error = (actual[name].double() - expected).norm() / max(expected.norm(), 1e-30)
            assert error < (3e-6 if dtype == "float32" else 1e-2 if name.startswith("d") else 4e-3), (config, name)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [40, 700, (30, 50)], ids=str)
def test_results_are_equal_to_the_bit_from_run_to_run_and_for_any_number_of_threads(window):
    case = swat_case(2100, window, 2, head_dim=20, documents="packed", logit_bias="tensor", batch=2)
    results = []
    for n in (1, 2, 2, 3, 7):
        torch.set_num_threads(n)
        results.append(case.call("cpp"))
    assert all(torch.equal(other[name], first) for name, first in results[0].items() for other in results[1:])


def test_calls_from_several_threads_do_not_disturb_one_another():
    case = swat_case(300, 40, 2)
    alone = case.call("cpp")
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: case.call("cpp"), range(8)))
    assert all(torch.equal(result[name], x) for result in together for name, x in alone.items())


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("window", [1, 5, 64, 100, (3, 2), (None, 4)], ids=str)
def test_an_unseen_key_changes_no_bit(value, window):
    q, k, v = torch.randn(3, 1, 2, 150, 16).unbind()
    clean = flex_swat(q, k, v, window, backend="cpp")
    left, right = window if isinstance(window, tuple) else (window - 1, 0)
    for j in (0, 64, 149):
        poisoned = k.clone()
        poisoned[:, :, j] = value
        out = flex_swat(q, poisoned, v, window, backend="cpp")
        i = torch.arange(150)
        unseen = (i - j > (150 if left is None else left)) | (j - i > right)
        assert torch.equal(out[:, :, unseen], clean[:, :, unseen])
        assert not torch.equal(out[:, :, ~unseen], clean[:, :, ~unseen])


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("window", [1, 5, 64, 100, (3, 2), (None, 4)], ids=str)
def test_gradients_of_others_do_not_change_for_an_unseen_key(value, window, name):
    """No bit of any other key's; and no bit of the rows of queries, but where a NaN or infinite key shares a tile."""
    inputs = dict(zip("qkv", torch.randn(3, 1, 2, 150, 16).unbind(), strict=True))
    grad, i = torch.randn(1, 2, 150, 16), torch.arange(150)
    left, right = window if isinstance(window, tuple) else (window - 1, 0)

    def gradients(**changed):
        leaves = [x.clone().requires_grad_() for x in (inputs | changed).values()]
        return torch.autograd.grad(flex_swat(*leaves, window, backend="cpp"), leaves, grad)

    clean = gradients()
    for j in (0, 64, 149):
        poisoned = inputs[name].clone()
        poisoned[:, :, j] = value
        found = gradients(**{name: poisoned})
        unseen = (i - j > (150 if left is None else left)) | (j - i > right)
        far = unseen
        if name == "k" and not math.isfinite(value):  # a group of up to 8 queries shares the products of its keys
            far = ~torch.nn.functional.max_pool1d((~unseen).float()[None], 15, 1, 7)[0].bool()
        assert torch.equal(found[0][:, :, far], clean[0][:, :, far])
        for x, before in zip(found[1:], clean[1:], strict=True):
            assert torch.equal(x[:, :, i != j], before[:, :, i != j])


def test_other_documents_and_padding_change_no_bit():
    q, k, v = torch.randn(3, 2, 2, 150, 16).unbind()
    ids = torch.zeros(2, 150, dtype=torch.int64)
    ids[:, 50:90], ids[1, 120:] = 1, -1
    clean = flex_swat(q, k, v, 64, document_ids=ids, backend="cpp")
    k[:, :, 50:90] = float("nan")
    q[1, :, 120:] = k[1, :, 120:] = float("nan")
    out = flex_swat(q, k, v, 64, document_ids=ids, backend="cpp")
    own = (ids == 0)[:, None, :, None].expand_as(out)
    assert torch.equal(out[own], clean[own])
    assert torch.equal(out[1, :, 120:], torch.zeros(2, 30, 16))


def test_document_ids_may_be_any_int64():
    q, k, v = torch.randn(3, 1, 2, 90, 16).unbind()
    ids = torch.arange(90) % 4 - 1
    wide = torch.where(ids < 0, ids * 2**40, ids * 2**32)  # equal in their last 32 bits
    out = [flex_swat(q, k, v, 64, document_ids=x, backend="cpp") for x in (ids, wide)]
    assert torch.equal(*out)


def test_visible_nan_is_not_hidden():
    q, k, v = torch.randn(3, 1, 1, 150, 16).unbind()
    k[:, :, 70].view(torch.int32).fill_(0x7F800001)  # whatever its payload
    bad = flex_swat(q, k, v, 10, backend="cpp").isnan().any(-1)[0, 0].nonzero().flatten()
    assert bad.tolist() == list(range(70, 80))


@pytest.mark.parametrize("logit", [-80.0, -40.0, -20.0, -16.0, -8.0, -1.0, 0.0, 8.0, 80.0])
def test_the_tail_of_the_sigmoid_keeps_its_relative_accuracy(logit):
    q = torch.zeros(1, 1, 70, 8)
    out = flex_swat(q, q, torch.ones_like(q), 1, slopes=None, logit_bias=logit, backend="cpp").double()
    exact = torch.sigmoid(torch.tensor(logit, dtype=torch.float64))
    assert ((out - exact).abs() / exact).max() < 1e-5  # a logit of 80 in float32 is known to 4e-6


QUICK = (*FLAGS, "-O0")  # seconds less a build, where no kernel has to be fast


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A library as it is kept."""
    folder = tmp_path_factory.mktemp("own")
    assert build(folder, QUICK).seconds > 0
    (path,) = folder.glob("*.so")
    return path


@pytest.fixture
def compilations(kept, tmp_path_factory, monkeypatch):
    """The file with a line for each time that $CXX linked, which takes half a second to copy a library."""
    folder = tmp_path_factory.mktemp("compiler")
    compiler, log = folder / "c++", folder / "log"
    compiler.write_text(f"""#!/bin/sh
if [ "$1" = --version ]; then echo pretended; exit; fi
case " $* " in *" -c "*) ;; *) echo linked >> {log}; sleep 0.5 ;; esac
for last; do :; done
cp {kept} "$last"
""")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    return log


def test_a_library_is_kept_and_loaded_again(kept):
    assert build(kept.parent, QUICK).seconds == 0


def test_a_damaged_library_is_built_again(tmp_path, compilations):
    """In a process of its own: a library once loaded stays mapped in its process."""
    build(tmp_path, QUICK)
    (path,) = tmp_path.glob("*.so")
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "truncated": whole[:middle],
        "empty": b"",
        "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "foreign": Path(torch.__file__).read_bytes(),
    }
    for name, bad in damaged.items():
        (tmp_path / name).mkdir(mode=0o700)
        (tmp_path / name / path.name).write_bytes(bad)
    found = start(*(tmp_path / name for name in damaged)).communicate()[0].splitlines()
    assert len(found) == len(damaged)
    for name, line in zip(damaged, found, strict=True):
        first, second = map(float, line.split())
        assert first > 0, name
        assert second == 0, name
        assert (tmp_path / name / path.name).read_bytes() == whole


def start(*folders):
    """A process that builds in each folder twice and prints the seconds of both."""
    program = (
        "import sys; from pathlib import Path; from swat_flex.backends.cpp.build import build\n"
        f"for folder in sys.argv[1:{len(folders) + 1}]:\n"
        f"    twice = [build(Path(folder), tuple(sys.argv[{len(folders) + 1}:])) for _ in range(2)]\n"
        "    assert twice[0].library.swat_forward; print(*(built.seconds for built in twice))"
    )
    command = [sys.executable, "-c", program, *map(str, folders), *QUICK]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_that_start_together_build_once(tmp_path, compilations):
    processes = [start(tmp_path) for _ in range(2)]
    assert [p.wait() for p in processes] == [0] * 2
    assert compilations.read_text() == "linked\n"
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.usefixtures("compilations")
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path):
    tmp_path.chmod(0o777)
    assert build(tmp_path, QUICK).library.swat_forward
    assert not list(tmp_path.iterdir())


def test_the_first_error_of_a_compiler_is_told(tmp_path, monkeypatch):
    with pytest.raises(BuildError, match=r"unrecognized|unknown"):
        build(tmp_path, flags=("-fno-such-thing",))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match=r"no C\+\+ compiler: no-such-compiler not found"):
        build(tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_without_a_library_auto_takes_banded_and_says_why(monkeypatch):
    monkeypatch.setattr(library, "_load", lambda: BuildError("no C++ compiler: g++ not found"))
    q, k, v = torch.randn(3, 1, 2, 30, 8).unbind()
    told = explain(q, k, v, 8)
    assert told.backend == "banded"
    assert "no C++ compiler" in told.why
    assert flex_swat(q, k, v, 8).shape == q.shape
    with pytest.raises(NotImplementedError, match=r"no C\+\+ compiler"):
        flex_swat(q, k, v, 8, backend="cpp")


def test_users_compiled_function_holds_it_whole():
    q, k, v = torch.randn(3, 1, 2, 60, 8).unbind()
    compiled = torch.compile(lambda q: flex_swat(q, k, v, 8) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), 2 * flex_swat(q, k, v, 8, backend="cpp"))


def test_an_interrupt_during_a_call_is_not_lost():
    program = """
import os, signal, threading, torch
from swat_flex import flex_swat
q, k, v = torch.randn(3, 1, 4, 6000, 64).unbind()
flex_swat(q[:, :, :64], k[:, :, :64], v[:, :, :64], 8, backend="cpp")
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    for _ in range(200):
        flex_swat(q, k, v, None, backend="cpp")
except KeyboardInterrupt:
    print("interrupted")
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.check_output([sys.executable, "-c", program], text=True, env=environment) == "interrupted\n"


def test_operators_pass_torchs_own_check():
    case = swat_case(70, 16, 2, 8, 5, documents="padded", logit_bias="tensor", fewer=3, batch=2)
    q, k, v = (x.detach().requires_grad_() for x in case.tensors())
    options = case.options()
    slopes, bias = options["slopes"].requires_grad_(), options["logit_bias"]
    rest = (slopes, bias, options["document_ids"], 15, 0, 0.3, "sigmoid")
    torch.library.opcheck(torch.ops.swat_flex.cpp, (q, k, v, *rest))
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in (case.gradient(), q, k, v, *rest)]
    torch.library.opcheck(torch.ops.swat_flex.cpp_backward, (*plain, True))
