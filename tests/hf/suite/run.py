"""Run transformers' own tests of any model on ours, and hold the failures against `expected.py`.

    python tests/hf/suite/run.py [--source CHECKOUT] [--only TestSwat ...] [--results FILE]

The tests come from the source distribution of the installed version, which pip brings into a temporary folder. It has
the tests of models and not those of generation and export: a checkout of transformers, nearest in version, adds them.

Exit status 0: every failure is expected and every expected failure failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers
from expected import ALL, expected

HERE = Path(__file__).resolve().parent
# What test_modeling_common imports and the distribution lacks: classes that then bring no tests.
MISSING = {
    "exporters/test_export.py": "ExportTesterMixin",
    "generation/test_utils.py": "GenerationTesterMixin",
}


def fetch(folder):
    """Bring the distribution's `tests` into the folder."""
    version = transformers.__version__
    command = ["download", "--quiet", "--no-deps", "--no-binary", "transformers", f"transformers=={version}"]
    subprocess.run([sys.executable, "-m", "pip", *command, "--dest", folder], check=True)
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    (folder / f"transformers-{version}" / "tests").rename(folder / "tests")


def complete(tests, source):
    """Add what the distribution lacks: from the source, else as classes without tests. Returns what is left out."""
    left_out = []
    for name, mixin in MISSING.items():
        path = tests / name
        if source is not None:
            shutil.copytree(source / "tests" / path.parent.name, path.parent, dirs_exist_ok=True)
        elif not path.exists():
            path.parent.mkdir()
            path.write_text(f"class {mixin}:\n    pass\n")
            left_out.append(name)
        (path.parent / "__init__.py").touch()
    (tests / "__init__.py").touch()
    return left_out


class Outcomes:
    """A pytest plugin: {"Class.test": "passed", "failed" or "skipped"}, a failed part failing its test."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        name = ".".join(report.nodeid.split("[")[0].split("::")[1:])
        if report.failed:
            self.found[name] = "failed"
        elif report.skipped:
            self.found.setdefault(name, "skipped")
        elif report.when == "call" and self.found.get(name) != "failed":
            self.found[name] = "passed"


def compare(found, reasons):
    """(failures that have no reason, tests with a reason that passed)."""
    failed = {name for name, outcome in found.items() if outcome == "failed"}
    passed = {name for name, outcome in found.items() if outcome == "passed"}
    return sorted(failed - reasons.keys()), sorted(passed & reasons.keys())


def run(folder, kinds, results):
    """Run the tests of `models.py` in this process. Returns the outcomes, written to results class by class."""
    import pytest  # after the path is set

    sys.path[:0] = [str(folder), str(HERE.parents[2])]
    found = {}
    for kind in kinds:
        outcomes = Outcomes()
        arguments = [f"{HERE / 'models.py'}::{kind}", "--noconftest", f"--rootdir={folder}", "-c", os.devnull]
        pytest.main(
            [*arguments, "-q", "--tb=short", "-p", "no:cacheprovider", "--disable-warnings"], plugins=[outcomes]
        )
        if not outcomes.found:
            raise SystemExit(f"{kind}: no test ran")
        found |= outcomes.found
        if results is not None:
            results.write_text(json.dumps(found, indent=1))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a checkout of transformers")
    parser.add_argument("--only", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--results", type=Path, help="a JSON file of the outcomes")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is taken from a hub
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch(folder)
        left_out = complete(folder / "tests", options.source)
        found = run(folder, options.only, options.results)
    new, gone = compare(found, expected())
    counts = {outcome: list(found.values()).count(outcome) for outcome in ("passed", "failed", "skipped")}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    for name in left_out:
        print(f"not run, for want of --source: tests/{name}")
    for name in new:
        print(f"fails, and expected.py has no reason for it: {name}")
    for name in gone:
        print(f"passes, and expected.py says that it fails: {name}")
    sys.exit(bool(new or gone))


if __name__ == "__main__":
    main()
