"""What every test shares: GPU tests skip without a GPU, and a failing test prints the seed of its inputs."""

import pytest
import torch


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
