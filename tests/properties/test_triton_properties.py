"""The laws on the triton backend, in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_laws_in_the_interpreter(pytestconfig):
    """In a process of its own: Triton decides at import whether it compiles or interprets."""
    file = Path(__file__).with_name("interpreted_properties.py")
    profile = pytestconfig.getoption("--hypothesis-profile") or "ci"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-profile={profile}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0
    assert " passed" in done.stdout
