"""Cases of which ordinary runs take a sample, and nightly runs all."""

from collections.abc import Sequence
from typing import Any

import pytest


def sampled(cases: Sequence[Any], every: int) -> list[Any]:
    """Parameters for pytest: every n-th case, the first included; the others are marked slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if i % every == 0 else pytest.mark.slow,
            id="-".join(map(str, case)) if isinstance(case, tuple) else str(case),
        )
        for i, case in enumerate(cases)
    ]
