"""Results of a GPU held against the error rule, with what it allows there."""

from swat_flex.testing.budget import measure
from swat_flex.testing.hardware import allowed_use


def assert_within(actual, *, exact, rough, **more):
    """`actual` may lie on any device; it was computed on a GPU."""
    budget = measure(actual.cpu(), exact.cpu(), rough.cpu(), **more)
    assert budget.use <= allowed_use(actual.dtype, "cuda"), str(budget)
