"""Random valid configurations × random calls, compiled and executed: `python tests/triton/search.py [--seconds 1800]`.

A program is the three kernels with a random valid configuration each; it runs on several calls that need no other one.
Every result is held to the definition in float64, every output to one write per element, every access to the rules of
`swat_flex.inspection.ptx`; and with one of a program's calls a key is NaN, which must leave the bits of rows that do
not see it, and of other keys' gradients, as they were. Prints how many ran; stops at the first that is wrong.
"""

import argparse
import contextlib
import io
import itertools
import random
import sys
import time
import traceback
from collections import Counter

import torch
from executed import Call, assert_near, assert_written_once
from triton.runtime.errors import OutOfResources

from swat_flex import tuned
from swat_flex.backends.triton.config import VALUES, TritonConfig, runs_on
from swat_flex.backends.triton.op import TUNABLES
from swat_flex.inspection.ptx import Fault

TARGETS = ("sm_80", "sm_90", "sm_120")
CALLS = 4  # of a program
EVERY = 60.0  # seconds between lines
LARGEST = 128  # queries or keys in a tile
CONFIGURATIONS = [
    config
    for config in itertools.starmap(TritonConfig, itertools.product(*VALUES.values()))
    if config.is_valid() and max(config.block_m, config.block_n) <= LARGEST
]
OTHERWISE = [n for n in range(2, 190) if n % 16]  # Triton compiles anew for 1 and for multiples of 16
DTYPES = {torch.bfloat16: (64, 16, 32, 40, 64, 128), torch.float16: (64, 32), torch.float32: (16, 32)}


def program(draw, target):
    """({kernel: configuration}, what the program's calls have in common, whether they look ahead)."""
    dtype = draw.choices(list(DTYPES), (6, 3, 1))[0]
    fits = [c for c in CONFIGURATIONS if dtype != torch.float32 or c.block_m * c.block_n <= 32 * 32]
    chosen = {kernel: draw.choice([c for c in fits if runs_on(kernel, c, target)]) for kernel in TUNABLES}
    common = {
        "dtype": dtype,
        "head_dim": draw.choice(DTYPES[dtype]),
        "slopes": draw.random() < 0.8,
        "bias": draw.random() < 0.5,
        "documents": draw.random() < 0.2,
        "per_head": dtype != torch.float32 and draw.random() < 0.2,  # whose sums cancel, which costs float32 more
    }
    return chosen, common, draw.random() < 0.3


def call_of(draw, common, ahead):
    """A call that the program takes."""
    length = draw.choice(OTHERWISE[32:])
    left = draw.choice([n for n in OTHERWISE if n < length])
    fewer = draw.choice([0, 0, *(n for n in OTHERWISE if n < length - 1 and (length - n) % 16)])
    heads, kv_heads = draw.choice(((2, 1), (2, 2), (4, 2)))
    window = (left, draw.choice(OTHERWISE[:50])) if ahead else (left, 0)
    return Call(length, window, heads=heads, kv_heads=kv_heads, fewer=fewer, **common)


def hold(call, target):
    """Raise Fault or AssertionError where the compiled code is wrong; the results."""
    found, launches = call.execute(target)
    assert_near(found, call.exact(), call.dtype)
    assert_written_once(launches)
    return found


def hold_unseen(call, target, before, key):
    """Raise AssertionError where a key that is NaN changes what does not depend on it."""
    inputs = call.inputs()
    inputs["k"][:, :, key] = float("nan")
    after, _ = call.execute(target, inputs)
    left, right = call.window
    query, token = torch.arange(call.fewer, call.length), torch.arange(call.length)
    unseen = (query - key > left) | (key - query > right)
    for name, rows in (("out", unseen), ("dk", token != key), ("dv", token != key)):
        same = (after[name] == before[name]).all(-1).all(1).all(0)
        assert same[rows].all(), (
            f"{name}: rows {(~same & rows).nonzero().flatten().tolist()[:20]} changed with key {key}"
        )


def search(targets, seed, first, over, ran):
    """Search until `over()`, counting in `ran`; what was wrong and how to run it again, or None."""
    for number in itertools.takewhile(lambda _: not over(), itertools.count(first)):
        draw, target = random.Random(f"{seed} {number}"), targets[number % len(targets)]
        chosen, common, ahead = program(draw, target)
        with tuned.using({TUNABLES[kernel].name: config for kernel, config in chosen.items()}):
            for at in range(CALLS):
                call = call_of(draw, common, ahead)
                try:
                    with contextlib.redirect_stdout(io.StringIO()) as errors:
                        found = hold(call, target)
                        if at == 0:
                            hold_unseen(call, target, found, draw.randrange(call.length))
                except OutOfResources:
                    ran["programs too large"] += 1
                    break
                except (Fault, AssertionError):
                    again = f"again: --seed {seed} --first {number} --targets {','.join(targets)}"
                    return f"{errors.getvalue()}{traceback.format_exc()}\n{target}, {chosen}, {call}\n{again}"
                ran[f"calls on {target}"] += 1
                ran["programs"] += at == 0
    return None


def main():
    """Parse the command line and search; exit status 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--seed", default=str(int(time.time())), help="the same seed draws the same programs and calls")
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    given = parser.parse_args()
    begin, ran, shown = time.monotonic(), Counter(), [0.0]

    def line():
        return f"{time.monotonic() - begin:.0f} s: " + ", ".join(f"{n} {what}" for what, n in sorted(ran.items()))

    def over():
        seconds = time.monotonic() - begin
        if seconds - shown[0] > EVERY:
            shown[0] = seconds
            print(line(), file=sys.stderr, flush=True)
        return seconds > given.seconds

    print(f"seed {given.seed}, {len(CONFIGURATIONS)} configurations", flush=True)
    wrong = search(given.targets.split(","), given.seed, given.first, over, ran)
    print(line() + ("" if wrong is None else f"\nWRONG\n{wrong}"), flush=True)
    return wrong is not None


if __name__ == "__main__":
    sys.exit(main())
