"""The Triton kernels under compute-sanitizer: minutes, so apart from the other GPU tests (`-m sanitizer`)."""

import shutil
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.sanitizer,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"),
]

SANITIZED = """
import torch
from swat_flex import flex_swat
for dim, length in ((64, 200), (40, 67)):
    q, k, v = (torch.randn(1, 2, length, dim, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in "qkv")
    slopes = torch.randn(2, device="cuda", requires_grad=True)
    flex_swat(q, k, v, 50, slopes=slopes, backend="triton").sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=_kernel"]
    done = subprocess.run([*command, sys.executable, "-c", SANITIZED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
