"""Plant faults and see which law finds each: `python hunt.py [--seconds N] [FAULT...]`, one JSON object a line.

Without names every fault is planted. With seconds the search of `swat-flex fuzz` looks for it that long instead, and
"found" counts the cases that it took and "said" what was said of the last.
Runs with TRITON_INTERPRET=1 and with tests/properties among the modules' paths.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings

import laws
import torch
from catalogue import FAULTS
from planting import Fault, planted

from swat_flex.testing.case import SwatCase
from swat_flex.testing.fuzz import Plan, search

BIASED = {"slopes": "tensor", "steepness": 0.5, "logit_bias": "tensor"}
CASES = {
    "banded": [
        SwatCase(65, 8, kv_heads=2, group=2, **BIASED),
        SwatCase(70, 20, fewer=5, batch=2, kv_heads=4, dtype="bfloat16", **BIASED),
        SwatCase(40, 3, kv_heads=2, head_dim=3, logit_bias="number", bias=-12.0),
    ],
    "cpp": [
        SwatCase(65, 8, kv_heads=2, group=2, **BIASED),
        SwatCase(230, 230, kv_heads=2, **BIASED),
        SwatCase(200, 180, fewer=197, kv_heads=2, group=2, ring=4, **BIASED),
        SwatCase(40, 3, kv_heads=2, head_dim=3, logit_bias="number", bias=-12.0),
    ],
    "triton": [
        SwatCase(40, 33, kv_heads=2, group=2, **BIASED),
        SwatCase(40, 3, kv_heads=1, head_dim=3, logit_bias="number", bias=-12.0),
        SwatCase(80, 40, kv_heads=1, head_dim=16),
    ],
    "flex": [
        SwatCase(300, 140, kv_heads=2, **BIASED),
        SwatCase(300, 3, kv_heads=2, logit_bias="number", bias=-12.0),  # of one program with the first
    ],
}


def fast_log_sigmoid(case: SwatCase, backend: str) -> None:
    """The derivative that flex brings along for CUDA is that of its function."""
    from swat_flex import modifiers

    x = torch.linspace(-9, 9, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(modifiers._FastLogSigmoid.apply, x, raise_exception=False)


def finder(fault: Fault) -> str | None:
    """The first law that the fault breaks."""
    for law in (*laws.LAWS, fast_log_sigmoid) if fault.backend == "flex" else laws.LAWS:
        for case in CASES[fault.backend]:
            try:
                law(case, fault.backend)
            except AssertionError:
                return str(law.__name__)
    return None


def cases_of_fuzzing(fault: Fault, limit: float) -> tuple[int | None, str]:
    """How many until the search finds the fault, shrinking apart, None if it does not; and what it says."""
    subtle = "units of the last place" in fault.name  # in float64 as many units of float32 are thousands
    plan = Plan((fault.backend,), dtypes=("float32",) if subtle else None)
    limit *= 5 if "1,000" in fault.name else 1  # of 400 cases a few are that long
    begin, cases = time.monotonic(), 1

    def record(*_: object) -> None:
        nonlocal cases
        cases += 1

    failure = search(plan, record, lambda: time.monotonic() - begin > limit)
    return (None, "") if failure is None else (cases, failure.text.splitlines()[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float)
    parser.add_argument("faults", nargs="*")
    wanted = parser.parse_args()
    limit = wanted.seconds
    faults = [fault for fault in FAULTS if not wanted.faults or str(fault) in wanted.faults]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for backend in {fault.backend: None for fault in faults}:  # without a fault nothing is found
        for case in CASES[backend]:
            laws.agreement(case, backend)
    for fault in faults:
        begin = time.monotonic()
        with planted(fault):
            found, said = (finder(fault), "") if limit is None else cases_of_fuzzing(fault, limit)
        record = {"fault": str(fault), "found": found, "said": said, "seconds": round(time.monotonic() - begin, 2)}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
