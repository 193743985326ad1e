"""The laws on cases that hypothesis draws, for the backends that run in this process."""

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given
from laws import LAWS, agreement

from swat_flex.testing.strategies import cases_for


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_banded(law):
    @given(case=cases_for("banded"))
    def holds(case):
        law(case, "banded")

    holds()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_flex(law):
    """Two programs: without documents and, for the laws that need them, with."""
    needs_documents = law.__name__ in ("shift", "packing", "silent_padding")

    @given(case=cases_for("flex", family=1 if needs_documents else 2).filter(lambda case: case.length <= 80))
    def holds(case):
        law(case, "flex")

    holds()


@pytest.mark.parametrize("law", [law for law in LAWS if law is not agreement], ids=lambda law: law.__name__)
def test_naive(law):
    """The laws themselves, on the definition."""

    @given(case=cases_for("banded", dtypes=("float64", "float32")))
    def holds(case):
        law(case, "naive")

    holds()
