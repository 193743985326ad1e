"""The report of a GPU: a step that is killed, hangs or fails costs itself alone, and no printed row is lost."""

import itertools
import json
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch
from perf_fakes import TINY, race, record, row

from perf import gpu_report, gpu_steps
from perf.cases import GPU_REPORT, PASSES
from perf.gpu_report import Step, assemble, plan, read_lines, run, write_record
from perf.measure import Setting, _ceilings
from perf.record import load

ABOUT = {
    "created": "2030-01-02T03:04:05Z", "commit": "0123456789", "threads": 2, "busy_ok": True,
    "load_before": {"cores": 0.0, "gpu_percent": 0}, "versions": record().versions, "device": asdict(record().device),
}  # fmt: skip
STUB = """
import os, sys, time
for line in sys.argv[2:]:
    print(line, flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), 9)
if sys.argv[1] == "hang":
    if os.fork() == 0:  # what it started holds its output open
        time.sleep(600)
    time.sleep(600)
if sys.argv[1] == "torn":
    print('{"n": 3, "to', end="", flush=True)
sys.exit(3 if sys.argv[1] == "fail" else 0)
"""
ENDINGS = {"kill": "killed by SIGKILL", "hang": "cut after 1 s", "fail": "exit status 3: ", "torn": "complete"}


def stub(step: Step, ending: str) -> Step:
    """A step that prints what such a step prints, and then ends badly."""
    lines = ['{"n": 1}', "no result", '{"n": 2}']
    if step.name == "versions":
        lines.append(json.dumps({"surroundings": ABOUT}))
    if step.name.startswith("race"):
        found = race(TINY, step.name.rpartition(" ")[2], [row("swat triton", 1.0)], "swat triton")
        lines.append(json.dumps({"race": asdict(found)}))
    if step.name.startswith("tests"):
        lines += [
            "[gw0] [ 50%] PASSED tests/gpu/test_a.py::test_x[a b]@group",
            "tests/gpu/test_a.py::test_y FAILED [100%]",
        ]
    words = (sys.executable, "-S", "-E", "-c", STUB, ending, *lines)
    return replace(step, words=words, seconds=1.0 if ending == "hang" else 1000.0, least=0.0)


def places():
    """Every step at night; in every run the first and last of all, of the tests and of the races."""
    names = [step.name for step in plan()]
    kinds = [[i for i, name in enumerate(names) if name.startswith(kind)] for kind in ("", "tests", "race")]
    sample = {i for kind in kinds for i in (kind[0], kind[-1])}
    for i, name in enumerate(names):
        yield pytest.param(i, id=name, marks=() if i in sample else pytest.mark.slow)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("at", places())
def test_a_step_that_ends_badly_costs_itself_alone(tmp_path, at, ending):
    """`hang` is cut after its share of what is left: a second, of the stubs' thousands."""
    steps = [stub(step, ending if i == at else "end") for i, step in enumerate(plan())]
    if ending == "hang" and at not in (0, 5):
        pytest.skip("a second each: two are enough")
    rows = run(steps, tmp_path, sum(step.seconds for step in steps))
    assert read_lines(tmp_path / gpu_report.LINES) == rows
    ended = {r["step"]: r["ended"] for r in rows if "ended" in r}
    assert list(ended) == [step.name for step in steps]
    assert ended.pop(steps[at].name).startswith(ENDINGS[ending])
    assert set(ended.values()) == {"complete"}
    for step in steps:
        of_step = [r for r in rows if r["step"] == step.name]
        if step.parse is gpu_report.json_row:
            assert [r["n"] for r in of_step if "n" in r] == [1, 2]
        if step.parse is gpu_report.test_row:
            found = [(r["test"], r["outcome"]) for r in of_step if "test" in r]
            assert found == [("tests/gpu/test_a.py::test_x[a b]", "passed"), ("tests/gpu/test_a.py::test_y", "failed")]
    found = load(write_record(tmp_path))
    assert {race.passes for race in found.races} == set(PASSES)
    assert found.failed_tests == ("tests/gpu/test_a.py::test_y",)  # beside the measurements, not instead of them
    assert len(found.steps) == len(steps)


def test_what_a_step_leaves_goes_to_the_later_and_too_little_is_no_search(tmp_path):
    steps = [Step("a", ("true",), 10.0), Step("b", ("true",), 10.0), Step("search", ("true",), 20.0, least=300.0)]
    clock = itertools.chain([0.0], itertools.repeat(100.0))
    rows = run(steps, tmp_path, 401.0, now=lambda: next(clock))
    assert [r["ended"] for r in rows] == ["complete", "complete", "complete"]  # the last has all that is left
    clock = itertools.chain([0.0], itertools.repeat(101.0))
    rows = run(steps[2:], tmp_path, 400.0, now=lambda: next(clock))
    assert rows[0]["ended"] == "left out: needs 300 s, and 299 s are left for it"


def test_the_plan_is_in_order_and_every_test_is_in_one_step():
    names = [step.name for step in plan()]
    assert names[0] == "versions"
    assert names[-4:] == ["tests, other dtypes", "tests, sanitizer", "tuning", "emulation"]
    assert names.index("tests, bfloat16") < names.index("race, SWAT 340M, forward") < names.index("ncu")
    tests = [step for step in plan() if step.name.startswith("tests")]
    assert all("-x" not in step.words for step in tests)
    (search,) = [step for step in plan() if step.least]
    assert (search.least, search.words.count("--shape"), search.words.count("--backend")) == (300.0, 1, 1)


CONTENDERS = {
    "forward": {"swat triton", "swat triton, descriptors"},
    "both": {"swat triton", "swat triton, backward, 4 warps", "swat triton, backward, 64×64, 4 warps"},
}
OTHERS = {"swat flex", "FlexAttention softmax", "FlashAttention-2 window", "cuDNN window", "SDPA causal"}


def test_every_shape_and_every_contender_is_in_the_plan():
    """And `banded`, tens of thousands of launches, in none of its graphs."""
    names = [step.name for step in plan()]
    layers = [f"race, {shape}, {passes}" for shape in ("SWAT 340M", "Mistral-7B", "gpt-oss") for passes in PASSES]
    assert [name for name in names if name.startswith("race")] == [
        *layers, "race, decode batch 1, forward", "race, decode batch 64, forward"
    ]  # fmt: skip
    assert [n for n in names if n.startswith("first")] == [f"first calls, {b}" for b in ("triton", "flex", "decode")]
    gpu = torch.device("cuda")
    for case, passes in itertools.product(GPU_REPORT[:3], PASSES):
        racing = {peer.name for peer in gpu_steps.GPU_ATTENTION if peer.supports(case, gpu, passes) is None}
        assert racing >= CONTENDERS[passes] | OTHERS, (case.name, passes)
    decoding = {peer.name for case in GPU_REPORT[3:] for peer in gpu_steps.GPU_DECODING}
    assert decoding >= {"swat_decode", "SDPA ring"}
    everybody = {peer.name for peer in (*gpu_steps.GPU_ATTENTION, *gpu_steps.GPU_DECODING)}
    assert not any("banded" in name or "naive" in name for name in everybody)
    assert set(_ceilings(TINY, Setting(torch.device("cpu"), 2, sizes=(8, 64)))) == {"matmul", "copy"}


def test_tests_of_a_gpu_lie_where_the_report_looks_and_the_sanitizer_is_apart():
    for file in sorted((gpu_report.ROOT / "tests").rglob("test_*.py")):
        text, name = file.read_text(encoding="utf-8"), file.relative_to(gpu_report.ROOT).as_posix()
        marks = set(re.findall(r"pytest\.mark\.(gpu|sanitizer)\b", text))
        assert len(marks) < 2, name
        assert not marks or name.startswith(gpu_report.GPU_TESTS), name


def test_a_new_stream_waits_for_the_current_one():
    """What it computes with may still be being computed there."""
    made = 0
    for file in (*gpu_report.ROOT.glob("[tap]*/**/*.py"), *gpu_report.ROOT.glob("swat_flex/**/*.py")):
        lines = file.read_text(encoding="utf-8").splitlines()
        for line, after in itertools.pairwise(lines):
            if re.search(r"cuda\.Stream\(\)", line):
                made += 1
                assert ".wait_stream(" in after, (file, line)
    assert made >= 4


def test_a_record_needs_its_device():
    with pytest.raises(ValueError, match="versions and device"):
        assemble([{"step": "race", "n": 1}])


@pytest.fixture
def printed(capsys):
    """What a step printed, as rows."""

    def read():
        return [found for line in capsys.readouterr().out.splitlines() if (found := gpu_report.json_row(line))]

    return read


def test_the_steps_on_a_pretended_device(printed, monkeypatch):
    """Every step of ours in this process, on a CPU: what they print makes a record."""
    monkeypatch.setattr(gpu_steps.load, "look", lambda device: gpu_steps.load.Load(0.0))
    gpu_steps.versions(dry=True)
    about = printed()
    assert {"swat triton", "swat_decode"} <= {r["peer"] for r in about if "peer" in r}
    for name in ("flex", "decode"):
        gpu_steps.first(name, dry=True)
        found = printed()
        assert [r["passes"] for r in found] == list(PASSES[: 1 if name == "decode" else 2])
        assert all(r["status"] == "right" and r["use"] <= 1 and r["first_call_s"] > 0 for r in found)
    gpu_steps.ncu(dry=True)
    assert printed() == [{"missing": "ncu is not installed"}]
    monkeypatch.setattr(
        gpu_steps, "GPU_ATTENTION", [p for p in gpu_steps.GPU_ATTENTION if p.name != "FlexAttention softmax"]
    )
    races = []
    for case in (GPU_REPORT[0], GPU_REPORT[-1]):
        gpu_steps.race(case.name, case.passes[-1], 60, dry=True)
        found = printed()
        races.append(found[-1])
        timed = [r["peer"] for r in found[-1]["race"]["rows"] if r["status"] == "timed"]
        assert timed
        for peer in timed:
            assert [r for r in found if r.get("peer") == peer and r.get("status") == "right"]
            assert len([r for r in found if r.get("peer") == peer and "ms" in r]) == 2  # each sample as it came
    assert len(assemble([*about, *races]).races) == 2


def test_a_race_without_time_admits_nobody_and_says_so(printed):
    gpu_steps.race(GPU_REPORT[0].name, "forward", 0.0, dry=True)
    rows = printed()[-1]["race"]["rows"]
    assert {r["reason"] for r in rows} == {"no time was left for it"}


def test_without_a_gpu_a_step_says_so(monkeypatch):
    monkeypatch.setattr(gpu_steps.torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        gpu_steps.place(dry=False)


@pytest.mark.slow  # every step in a process of its own, pytest and tuning among them
def test_a_dry_run_of_everything(tmp_path):
    rows = run(plan(dry=True), tmp_path, 3600)  # a limit; it takes minutes
    assert {r["step"]: r["ended"] for r in rows if "ended" in r and r["ended"] != "complete"} == {}
    assert len(load(write_record(tmp_path)).races) == sum(len(case.passes) for case in GPU_REPORT)
