"""Look-ups at call time: what is used, from where, and what they never do."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from autotune import Entry, Store, StoreWarning, Timing, Versions
from swat_flex import explain, flex_swat, naive_swat, tuned
from swat_flex.backends.banded import BandedConfig, op
from swat_flex.backends.cpp import library
from swat_flex.backends.triton.op import TUNABLES
from swat_flex.dispatch import BACKEND, BackendConfig
from swat_flex.problem import Problem

ON_CPU = "banded" if library.trouble() else "cpp"
TUNED = BandedConfig(32, 2**18, 4)
WATCHED = {"open", "os.listdir", "os.scandir", "subprocess.Popen"}
_opened: list[str] | None = None


def _watch(event: str, args: tuple[object, ...]) -> None:
    if _opened is not None and event in WATCHED:
        _opened.append(f"{event} {args[:1]}")


sys.addaudithook(_watch)


@contextmanager
def file_accesses() -> Iterator[list[str]]:
    global _opened  # noqa: PLW0603  (an audit hook cannot be taken back)
    _opened = found = []
    try:
        yield found
    finally:
        _opened = None


def problem(length=300, window=64, needs_grad=False, **changes):
    made = Problem.of_self_attention(2, length, 16, torch.float32, "cpu", window)
    return dataclasses.replace(made, needs_grad=needs_grad, **changes)


def entry_for(tunable, config, of=None, **changes):
    of = of or problem()
    space = tunable.space(of)
    default, winner = space.to_json(space.default), dataclasses.asdict(config)
    timings = [(default, Timing(2.0, 0.1, 15)), (winner, Timing(1.0, 0.1, 15))]
    key = dataclasses.replace(tunable.key(of), **changes)
    return Entry(key, winner, default, timings, [], "wall", False, datetime(2026, 1, 1, tzinfo=UTC))


def qkv(length=300, **options):
    return [torch.randn(1, 2, length, 16, **options) for _ in range(3)]


@pytest.fixture
def used(monkeypatch):
    """The configurations that `banded` cut its calls by."""
    seen = []

    class Band(op.Band):
        def __init__(self, *args):
            seen.append(args[-1])
            super().__init__(*args)

    monkeypatch.setattr(op, "Band", Band)
    return seen


def test_a_measured_configuration_runs_and_explain_names_its_entry(measured, used):
    entry = entry_for(op.FORWARD, TUNED)
    Store(measured).put(entry)
    q, k, v = qkv()
    torch.testing.assert_close(flex_swat(q, k, v, 64, backend="banded"), naive_swat(q, k, v, 64), atol=1e-4, rtol=1e-4)
    assert used == [TUNED]
    told = explain(q, k, v, 64, backend="banded")
    origin = f"user cache, entry banded.forward {entry.key.digest[:8]}"
    assert told.configuration == (("banded.forward", str(TUNED), origin),)
    assert f"banded.forward: {TUNED} ({origin})" in str(told)


def test_forward_and_backward_are_looked_up_apart(measured, used):
    Store(measured).put(entry_for(op.BACKWARD, TUNED))
    q, k, v = qkv(requires_grad=True)
    flex_swat(q, k, v, 64, backend="banded").sum().backward()
    assert used == [op.FORWARD.default(problem()), TUNED]
    told = explain(q, k, v, 64, backend="banded")
    assert [x.origin.split(" ")[0] for x in told.configuration] == ["default", "user"]
    assert told.configuration[1].configuration == str(TUNED)


def test_a_bucket_shares_and_another_does_not(measured, used):
    Store(measured).put(entry_for(op.FORWARD, TUNED))
    for length, window in ((512, 65), (257, 3)):  # up to a power of two; windows of up to 64 tokens to the left
        flex_swat(*qkv(length), window, backend="banded")
    assert used == [TUNED] * 2
    for length, window in ((513, 64), (256, 64), (300, 66), (300, None)):
        flex_swat(*qkv(length), window, backend="banded")
    assert TUNED not in used[2:]


def test_no_file_is_touched_from_the_second_call_on(measured):
    Store(measured).put(entry_for(op.FORWARD, TUNED))
    q, k, v = qkv()
    with file_accesses() as first:
        flex_swat(q, k, v, 64, backend="banded")
    with file_accesses() as later:
        for _ in range(3):
            flex_swat(q.clone(), k, v, 64, backend="banded")
    assert first
    assert later == []


def test_a_look_up_writes_nothing(measured):
    flex_swat(*qkv(), 64, backend="banded")
    assert not measured.exists()
    Store(measured).put(entry_for(op.FORWARD, TUNED))
    before = {path: path.read_bytes() for path in measured.iterdir()}
    tuned.refresh()
    flex_swat(*qkv(), 64, backend="banded")
    assert {path: path.read_bytes() for path in measured.iterdir()} == before


def test_a_torn_entry_is_a_miss_told_once(measured, used):
    Store(measured).put(entry_for(op.FORWARD, TUNED))
    (path,) = measured.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(StoreWarning, match="was not used"):
        flex_swat(*qkv(), 64, backend="banded")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flex_swat(*qkv(), 64, backend="banded")
    assert used == [op.FORWARD.default(problem())] * 2


def test_a_configuration_out_of_its_space_is_not_run(measured, used):
    Store(measured).put(entry_for(op.FORWARD, BandedConfig(7, 2**18, 4)))
    with pytest.warns(StoreWarning, match="block"):
        flex_swat(*qkv(), 64, backend="banded")
    assert used == [op.FORWARD.default(problem())]


def test_a_folder_that_cannot_be_read_leaves_the_default(tmp_path, monkeypatch, used):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("AUTOTUNE_DIR", str(blocked))
    tuned.store.cache_clear()
    flex_swat(*qkv(), 64, backend="banded")
    assert used == [op.FORWARD.default(problem())]


def test_a_preset_is_used_and_explain_says_what_it_was_measured_with(tmp_path, monkeypatch, used):
    other = {"source": "older", "versions": Versions("2.11.0", "3.6.0")}
    shipped = entry_for(op.FORWARD, TUNED, **other)
    (tmp_path / "cpu.json").write_text(json.dumps({"format": 1, "entries": [shipped.to_json()]}))
    monkeypatch.setattr(tuned, "PRESETS", tmp_path)
    q, k, v = qkv()
    flex_swat(q, k, v, 64, backend="banded")
    assert used == [TUNED]
    (told,) = explain(q, k, v, 64, backend="banded").configuration
    assert (
        told.origin
        == f"shipped preset banded.forward {shipped.key.digest[:8]}, measured with torch 2.11.0, triton 3.6.0"
    )


def test_configurations_in_force_come_first_and_go_again(measured, used):
    Store(measured).put(entry_for(op.FORWARD, TUNED))
    outer, inner = BandedConfig(48), BandedConfig(80)
    with tuned.using({"banded.forward": outer}):
        with tuned.using({"banded.forward": inner, "banded.backward": inner}):
            flex_swat(*qkv(), 64, backend="banded")
        flex_swat(*qkv(), 64, backend="banded")
        assert tuned.forced(op.BACKWARD) is None
    flex_swat(*qkv(), 64, backend="banded")
    assert used == [inner, outer, TUNED]


def test_a_measured_backend_is_preferred_where_it_can_run(measured):
    store = Store(measured)
    store.put(entry_for(BACKEND, BackendConfig("flex")))
    store.put(entry_for(BACKEND, BackendConfig("flex"), problem(needs_grad=True)))  # which flex cannot do here
    store.put(entry_for(BACKEND, BackendConfig("triton"), problem(3000)))
    assert explain(*qkv(), 64).backend == "flex"
    assert "measured" in explain(*qkv(), 64).why
    assert explain(*qkv(requires_grad=True), 64).backend == ON_CPU
    assert explain(*qkv(3000), 64).backend == ON_CPU
    assert explain(*qkv(), 64, backend="banded").backend == "banded"


@pytest.mark.parametrize("requires_grad", [False, True])
def test_fifty_lengths_make_few_graphs_with_measurements_of_each(measured, requires_grad):
    """Neither the preferred backend nor a configuration is read while tracing; both would tell lengths apart."""
    store = Store(measured)
    for length in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        store.put(entry_for(op.FORWARD, BandedConfig((32, 48, 64)[length % 3]), problem(length)))
        of = problem(length, needs_grad=requires_grad)
        store.put(entry_for(BACKEND, BackendConfig("flex" if length % 3 == 0 else "banded"), of))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: flex_swat(q, k, v, 64), fullgraph=True, backend=counter)
    for length in range(1, 301, 6):
        q, k, v = qkv(length, requires_grad=requires_grad)
        out = compiled(q, k, v)
        torch.testing.assert_close(out, naive_swat(q, k, v, 64), atol=1e-3, rtol=1e-3)
        if requires_grad:
            out.sum().backward()
    assert counter.frame_count <= 3


def test_a_measured_configuration_is_used_inside_a_callers_compile(measured, used):
    Store(measured).put(entry_for(op.FORWARD, TUNED))
    torch.compile(lambda q, k, v: flex_swat(q, k, v, 64, backend="banded"), fullgraph=True, backend="aot_eager")(*qkv())
    assert used == [TUNED]


def test_every_default_opens_its_space():
    for tunable in (op.FORWARD, op.BACKWARD, *TUNABLES.values()):
        for dim, dtype in ((16, torch.float32), (64, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)):
            of = dataclasses.replace(problem(needs_grad=True), head_dim=dim, value_dim=dim, dtype=dtype)
            space = tunable.space(of)
            assert space.default == tunable.default(of)
            assert all(config.is_valid() for config in space.candidates)


def test_remembered_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(tuned, "KEPT", 5)
    for length in range(1, 20):
        flex_swat(*qkv(length), 4)
    assert len(tuned._found) <= 5 + 1
