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
        ([*SCALE, "--constexpr", "B"], "expected NAME=VALUE, got 'B'"),
        (SCALE, "constexprs: expected a value for B, got {}"),
        ([*SCALE, "--constexpr", "B=100"], "expected a kernel that compiles for sm_90, got CompilationError"),
        ([*SCALE, "--constexpr", "B=128", "--warps", "3"], "--warps: expected a power of two, got 3"),
        ([*SCALE, "--constexpr", "B=128", "--json", "/no/such/folder/x"], "--json: expected a file that can be"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_2(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert words in line
    assert "Traceback" not in result.output
