"""The wheel as a user without any extra gets it: beside torch alone, and beside what the command line needs."""

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

REPOSITORY = Path(__file__).parent.parent
LIBRARY = """
import sys, torch, swat_flex
assert swat_flex.__file__.startswith(sys.prefix), swat_flex.__file__
q, k, v = torch.randn(3, 1, 2, 40, 8, requires_grad=True).unbind()
out = swat_flex.flex_swat(q, k, v, 9)
torch.testing.assert_close(out, swat_flex.naive_swat(q, k, v, 9))
out.sum().backward()
"""


def run(python, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *arguments], env=environment, cwd=python.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the working tree, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = f"import os; os.chdir({str(REPOSITORY)!r}); from hatchling.build import build_wheel; "
    run(Path(sys.executable), "-c", build + f"build_wheel({str(folder)!r})")
    (built,) = folder.glob("*.whl")
    return built


def needed_by(*packages):
    """The packages and all that they require here, by distribution."""
    found = {}
    waiting = list(packages)
    while waiting:
        name = re.split(r"[^\w.-]", waiting.pop())[0].lower().replace("_", "-")
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if name not in found:
            found[name] = distribution
            waiting += [line for line in distribution.requires or () if "extra ==" not in line]
    return found


def environment(folder, wheel, *packages):
    """The Python of a new environment that holds the wheel and these packages, which are links to this one's."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for distribution in needed_by(*packages).values():
        for top in {Path(str(file)).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    run(Path(sys.executable), "-m", "zipfile", "-e", str(wheel), str(site))
    return python


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_the_library_needs_torch_alone(wheel, tmp_path):
    python = environment(tmp_path / "environment", wheel, "torch")
    assert "False" in run(python, "-c", "import importlib.util as u; print(any(map(u.find_spec, ['rich', 'numpy'])))")
    run(python, "-c", LIBRARY)


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_the_command_line_runs_from_the_wheel(wheel, tmp_path):
    python = environment(tmp_path / "environment", wheel, "torch", "typer", "rich", "platformdirs")
    run(python, "-c", LIBRARY)
    assert "torch" in run(python, "-m", "swat_flex", "info")
