"""A search is worth what it finds: each planted fault must be found, by the laws and by `swat-flex fuzz`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

from catalogue import FAULTS

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SMALL = {  # what only many cases show
    "4 units of the last place in the tail",
    "sum in the wrong precision",
    "a key at a tile's border lost by one row",
    "a key at a tile's border lost by one row in 1,000",
}
SAMPLE = {"mask off by one", "missing gradient term", "dropped left edge", "wrong key head"}  # in every run
BUILT = {"mask off by one", "missing gradient term"}  # of `cpp`, where each is a library of its own to compile


def each(sample):
    """Every fault's name as pytest parameter; those outside the sample are planted at night."""

    def marks(fault):
        in_every_run = fault.name in sample and (fault.backend != "cpp" or fault.name in BUILT)
        return [needs_triton] * (fault.backend == "triton") + [pytest.mark.slow] * (not in_every_run)

    return [pytest.param(str(fault), marks=marks(fault)) for fault in FAULTS]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_it_fits_the_source(fault):
    """In every run: the laws and the search plant most faults at night alone."""
    assert fault.changed() != fault.source.read_text()


SECONDS = 60  # of fuzzing, in which each fault must be found


def hunt(*arguments):
    """What hunt.py found, by fault. A process of its own: Triton decides at import whether it interprets."""
    here = Path(__file__).parent
    paths = [str(here.parent / "properties"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(here / "hunt.py"), *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return {record["fault"]: record["found"] for record in records}


@pytest.fixture(scope="module")
def found_by_laws(request):
    """Only the faults that this run asks for."""
    return hunt(
        *{item.callspec.params["fault"] for item in request.session.items if "found_by_laws" in item.fixturenames}
    )


@pytest.fixture(scope="module")
def found_by_fuzzing():
    return hunt("--seconds", str(SECONDS))


@pytest.mark.parametrize("fault", [fault for fault in each(SAMPLE) if not SMALL & {fault.values[0].split(": ")[1]}])
def test_a_law_finds_it(found_by_laws, fault, record_property):
    record_property(fault, found_by_laws[fault])
    assert found_by_laws[fault]


@pytest.mark.parametrize("fault", each(()))
def test_fuzzing_finds_it(found_by_fuzzing, fault, record_property):
    if fault.endswith("missing gradient term") and fault.startswith("flex"):
        pytest.skip("flex has no backward on a CPU")
    cases = found_by_fuzzing[fault]
    record_property(fault, f"fuzzing, after {cases} cases")
    assert cases is not None
