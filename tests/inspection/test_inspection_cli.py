"""`swat-flex inspect`: what it prints, what it writes, and one line for what is wrong."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swat_flex.cli import app
from swat_flex.inspection import TARGETS

pytest.importorskip("triton", reason="needs triton, which is built for Linux alone")

KERNELS = Path(__file__).with_name("inspection_kernels.py")
SCALE = [f"{KERNELS}:scale_kernel", "--signature", "*fp32,*fp32,i32:16,fp32"]
ATTEND = [f"{KERNELS}:attend_kernel", "--signature", "*bf16,*bf16,*bf16,*bf16,i32,fp32"]
TILE = ["--constexpr", "BM=128", "--constexpr", "BN=64"]


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *arguments])


def test_the_report_and_the_file_agree(tmp_path):
    file = tmp_path / "facts.json"
    result = run(*ATTEND, *TILE, "--target", "sm_90", "--gpu", "H100", "--flops", "2097152", "--json", str(file))
    assert result.exit_code == 0, result.output
    facts = json.loads(file.read_text())
    (loop,) = facts["loops"]
    assert (facts["kernel"], facts["target"], facts["gpu"], facts["warps"]) == ("attend_kernel", "sm_90", "H100", 4)
    assert f"{facts['resources']['registers']} per thread" in result.output
    assert f"loop at {loop['start']:#x}" in result.output
    assert loop["counts"]["EX2"] == 64
    assert loop["prediction"]["bound"] in result.output
    assert f"{loop['prediction']['tflops']:.0f}" in result.output
    assert "not a measurement" in result.output
    assert "not a measurement" in facts["note"]


def test_without_a_kernel_it_reports_ours(tmp_path):
    file = tmp_path / "ours.json"
    result = run("--target", "sm_90", "--head-dim", "64", "--window", "1024", "--gpu", "H200", "--json", str(file))
    assert result.exit_code == 0, result.output
    records = json.loads(file.read_text())
    assert [record["kernel"] for record in records] == [
        "forward_kernel",
        "query_gradient_kernel",
        "key_gradients_kernel",
        "decode_kernel",
    ]
    for record in records[:3]:
        assert record["kernel"] in result.output
        interior = min(record["loops"], key=lambda loop: loop["instructions"])
        assert interior["prediction"]["bound"]
        assert interior["prediction"]["tflops"] > 0
    (loop,) = records[3]["loops"]
    assert loop["prediction"]["bound"] == "memory"
    assert records[3]["copied"] == 1024 * 2 * 64 * 2
    assert "134,217,728 bytes" in result.output  # 64 sequences, 8 key heads
    assert "28.0 µs on H200" in " ".join(result.output.split())
    assert "not a measurement" in result.output


def test_decoding_is_bound_by_memory_though_no_gpu_is_named():
    result = run("--target", "sm_90", "--head-dim", "64", "--window", "1024")
    assert result.exit_code == 0, result.output
    decode = result.output[result.output.index("decode_kernel") :]
    assert decode[decode.index("predicted bound") :].split()[2] == "memory"


def run_case(name, *arguments):
    return run(f"{KERNELS}:{name}", "--run", "--target", "sm_90", *arguments)


def test_a_function_of_ones_own_is_executed(tmp_path):
    file = tmp_path / "ran.json"
    result = run_case("scale_case", "--json", str(file))
    assert result.exit_code == 0, result.output
    (record,) = json.loads(file.read_text())
    (launch,) = record["launches"]
    assert (launch["kernel"], launch["grid"]) == ("scale_kernel", [8])
    assert launch["writes"] == {"x": {"0": 1000}, "out": {"1": 1000}}
    assert record["results"]["out"]["relative"] == 0
    assert record["fault"] is None
    output = " ".join(result.output.split())
    assert "out written: 1,000 elements once" in output
    assert "not written x" in output
    assert f"{launch['instructions']}, {launch['missed']} never ran" in output


def test_a_fault_names_kernel_instruction_thread_address_and_source(tmp_path):
    file = tmp_path / "ran.json"
    result = run_case("overrun_case", "--json", str(file))
    assert result.exit_code == 1, result.output
    (record,) = json.loads(file.read_text())
    for words in ("scale_kernel: out of bounds of x, byte 4000 of 4000", "thread 104 of block (7, 0, 0)",
                  "inspection_kernels.py:", "ld.global", "address 0x"):  # fmt: skip
        assert words in record["fault"]
    assert record["fault"] in result.output


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_our_own_kernels_are_executed(target, tmp_path):
    file = tmp_path / "ran.json"
    result = run("--run", "--target", target, "--head-dim", "16", "--json", str(file))
    assert result.exit_code == 0, result.output
    attend, step = json.loads(file.read_text())
    assert [x["kernel"] for x in attend["launches"]] == [
        "forward_kernel",
        "query_gradient_kernel",
        "key_gradients_kernel",
    ]
    assert "decode_kernel" in {x["kernel"] for x in step["launches"]}
    for record in (attend, step):
        for name, found in record["results"].items():
            assert found["relative"] < 4e-3, name  # half a unit of bfloat16
            assert f"{found['relative']:.2e}" in result.output
        for launch in record["launches"]:
            assert not launch["undefined"]
            results = {
                name: set(counts) for name, counts in launch["writes"].items() if name in ("out", "dq", "dk", "dv")
            }
            assert results
            assert all(times == {"1"} for times in results.values()), launch["kernel"]


def test_unknown_rates_are_said():
    result = run(*ATTEND, *TILE, "--target", "gfx942")
    assert result.exit_code == 0, result.output
    assert "tensor cores, of the known units" in result.output
    assert "no published rate for gfx942" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "sm_70"], f"expected one of {', '.join(TARGETS)}, got 'sm_70'"),
        (["--gpu", "A100"], "gpu: expected a GPU of sm_90 (H100, H200), got 'A100'"),
        (["--head-dim", "512"], "--head-dim: expected 1 to 256, got 512"),
        (["--window", "0"], "--window: expected keys per query"),
        (["attend_kernel"], "expected a module and a kernel, as in kernels.py:forward, got 'attend_kernel'"),
        (["no_such_module:kernel"], "expected a kernel that can be imported, got 'no_such_module:kernel'"),
        ([f"{KERNELS}:no_such_kernel"], "expected a kernel that can be imported"),
        ([f"{KERNELS}:not_a_kernel"], "kernel: expected a triton.jit function, got int"),
        (
            [*SCALE, "--target", "sm_70"],
            "target: expected one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942, got 'sm_70'",
        ),
        ([*SCALE, "--gpu", "A100"], "gpu: expected a GPU of sm_90 (H100, H200), got 'A100'"),
        (["--run", "--target", "sm_100"], "expected one of sm_80, sm_86, sm_89, sm_90, sm_120, got 'sm_100'"),
        ([SCALE[0], "--run"], "expected with --run a function that launches the kernel on CPU tensors"),
        ([f"{KERNELS}:idle_case", "--run"], "expected a function that launches kernels on CPU tensors, got one"),
        ([*SCALE, "--constexpr", "B"], "expected NAME=VALUE, got 'B'"),
        (SCALE, "constexprs: expected a value for B, got {}"),
        ([*SCALE, "--constexpr", "B=100"], "expected a kernel that compiles for sm_90, got CompilationError"),
        ([*SCALE, "--constexpr", "B=128", "--warps", "3"], "--warps: expected a power of two, got 3"),
        ([*SCALE, "--constexpr", "B=128", "--json", "/dev/null/x"], "--json: expected a file that can be"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert words in line
    assert "Traceback" not in result.output
