"""The comparison of a GPU with the emulation of its code: what it tells, and that it sees a bit that differs."""

import json

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("numpy")

from perf import emulated


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of sm_90 whose results are the given function of what the emulation gave."""

    def install(change):
        def run(case, device, target):
            assert target == "sm_90"
            found = {"out": torch.linspace(-1, 1, 64).to(case.torch_dtype)}
            return found if device.type == "cpu" else {name: change(x) for name, x in found.items()}

        monkeypatch.setattr(emulated, "place", lambda dry: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(emulated, "run", run)

    return install


def nudged(x):
    """One element moved to the next number of its dtype."""
    x = x.clone()
    x[0] = torch.nextafter(x[0], torch.zeros_like(x[0]))
    return x


EXACT = sum(isinstance(case, emulated.Exact) for case in emulated.CASES)


@pytest.mark.parametrize(
    ("change", "wrong"), [(lambda x: x, 0), (nudged, EXACT), (lambda x: x * float("nan"), len(emulated.CASES))]
)
def test_what_differs_by_more_than_it_may_is_counted(change, wrong, gpu, capsys):
    gpu(change)
    assert emulated.main(dry=False) == wrong
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["holds"] for row in rows].count(False) == wrong
    assert EXACT >= 2


@pytest.mark.slow  # compiles and executes three kernels twice
def test_an_emulation_repeats_to_the_bit(capsys):
    assert emulated.main(dry=True) == 0
    assert all(json.loads(line)["equal"] == 1 for line in capsys.readouterr().out.splitlines())
