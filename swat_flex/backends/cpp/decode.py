"""Decoding on a CPU: new queries against a ring of keys and values, each of which is read once."""

from __future__ import annotations

from torch import Tensor

from swat_flex.backends.cpp import library
from swat_flex.backends.operator import define_decode, empty_output


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, slopes: Tensor | None, logit_bias: Tensor | None,
    window: int, scale: float,
) -> Tensor:  # fmt: skip
    out = empty_output(q, values.shape[3])
    vectors = {"slopes": slopes, "logit_bias": logit_bias, "length": length}
    library.run(
        "swat_decode",
        {"q": q, "k": keys, "v": values, "out": out},
        {name: None if x is None else x.contiguous() for name, x in vectors.items()},
        left=window - 1,
        scale=scale,
    )
    return out


decode = define_decode("cpp", _decode)
