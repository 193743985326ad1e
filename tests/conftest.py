"""What every test shares: GPU tests skip without a GPU, and a failing test prints the seed of its inputs.

A test and the processes that it starts compute on one thread each, because `make test` runs two tests at a time.
Tests that share a module's fixture run on one of its two workers; the others go to whichever is free.

Hypothesis has two profiles, chosen by pytest's --hypothesis-profile: "ci", the default, draws the same cases every
time; "night" draws others for hours.
"""

import gc
import itertools
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read when torch is imported, by the processes that tests start too.
os.environ["OMP_NUM_THREADS"] = os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import pytest
import torch

from swat_flex import tuned

torch.set_num_threads(1)

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the extra `fuzz`; the tests that need it are skipped
    pass
else:
    _SHARED = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
    settings.register_profile("ci", max_examples=25, derandomize=True, database=None, **_SHARED)
    settings.register_profile("night", max_examples=20_000, **_SHARED)
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Let Ctrl-C be tested and give the run one folder of compiled kernels, which its workers share."""
    # Shells start background jobs with SIGINT ignored, and children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits the variables
        # Of this run alone: torch's key of a compiled graph knows no change of an operator of ours.
        folder = tempfile.TemporaryDirectory(prefix="swat-flex-compiled-", ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            os.environ[name] = os.path.join(folder.name, name.split("_")[0].lower())


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "long" not in item.keywords)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "xdist_group" not in item.keywords and _shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.location[0]))


def pytest_collection_finish() -> None:
    """Spare the garbage collector, which every count of memory calls, what lives as long as the run."""
    gc.collect()
    gc.freeze()


def _shares_a_fixture(item: pytest.Item) -> bool:
    """Whether the test uses a fixture that its module makes once, which a second worker would make again."""
    fixtures = item._fixtureinfo.name2fixturedefs.values() if isinstance(item, pytest.Function) else ()
    return any(fixture.scope == "module" for several in fixtures for fixture in several)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """torch's global generator starts from the same number in every test; pytest shows it when the test fails."""
    number = sum(request.node.nodeid.partition("@")[0].encode())  # a worker writes the test's group behind an @
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
