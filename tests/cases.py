"""Cases for numeric tests, and their results: exact, and with what a low-precision matrix product rounds."""

from typing import Any

from torch import Tensor

from swat_flex.testing.budget import exact_results, rough_swat, with_gradients
from swat_flex.testing.case import SwatCase


def swat_case(
    length: int = 129,
    window: Any = 64,
    group: int = 1,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: str = "float32",
    layout: str = "contiguous",
    **more: Any,
) -> SwatCase:
    """A case with slopes of both signs, small enough for its length, and two key heads unless `more` says otherwise.

    `layout` is that of q, k and v; a window of "L" is the length, "L+5" that and 5 more.
    """
    more = {"kv_heads": 2, "slopes": "tensor", "steepness": 2 / max(length, 16)} | more
    return SwatCase(
        length,
        {"L": length, "L+5": length + 5}.get(window, window),
        group=group,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        dtype=dtype,
        layouts=(layout, layout, layout, "contiguous"),
        **more,
    )


def exact_of(case: SwatCase) -> dict[str, Tensor]:
    """Output and gradients by the definition in float64."""
    return exact_results(case.tensors(), case.window, case.gradient(), **case.options())


def rough_of(case: SwatCase) -> dict[str, Tensor]:
    """The same by `rough_swat`."""
    return with_gradients(rough_swat, case.tensors(), case.window, case.gradient(), **case.options())
