"""What every test shares: GPU tests skip without a GPU, and a failing test prints the seed of its inputs.

Hypothesis has two profiles, chosen by pytest's --hypothesis-profile: "ci", the default, draws the same cases every
time; "night" draws others for hours.
"""

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swat_flex import tuned

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the extra `fuzz`; the tests that need it are skipped
    pass
else:
    _SHARED = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
    settings.register_profile("ci", max_examples=40, derandomize=True, database=None, **_SHARED)
    settings.register_profile("night", max_examples=20_000, **_SHARED)
    settings.load_profile("ci")


def pytest_configure() -> None:
    """Shells start background jobs with SIGINT ignored, and children inherit that: Ctrl-C is tested here too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """torch's global generator starts from the same number in every test; pytest shows it when the test fails."""
    number = sum(request.node.nodeid.encode())
    torch.manual_seed(number)
    print(f"torch.manual_seed({number})")
    return number


@pytest.fixture(autouse=True)
def measured(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of this test's measurements, empty: what this machine was tuned to changes no test."""
    folder = tmp_path_factory.getbasetemp() / "measured" / str(next(_numbers))
    monkeypatch.setenv("AUTOTUNE_DIR", str(folder))
    tuned.store.cache_clear()
    tuned.refresh()
    yield folder
    tuned.store.cache_clear()
    tuned.refresh()


_numbers = itertools.count()
