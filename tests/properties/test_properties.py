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


WITHOUT_DOCUMENTS = [law for law in LAWS if law.__name__ not in ("shift", "packing", "silent_padding")]
FLEX = [(law, 1) for law in LAWS] + [pytest.param(law, 2, marks=pytest.mark.slow) for law in WITHOUT_DOCUMENTS]


@pytest.mark.xdist_group("flex")
@pytest.mark.parametrize(("law", "family"), FLEX)
def test_flex(law, family):
    """A program of its own for each family, the first one with documents."""

    @given(case=cases_for("flex", family=family).filter(lambda case: case.length <= 80))
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
