"""Pairwise covering: few cases in which every two values of every two factors meet."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def pairwise(factors: Mapping[str, Sequence[Any]], valid: Callable[[Case], bool], seed: int = 0) -> list[Case]:
    """Greedy: each row is the best of 40 random ones around a pair not yet met; an impossible pair is dropped."""
    rng = random.Random(seed)
    open_pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(factors, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows = []
    while open_pairs:
        wanted = min(open_pairs)
        best: tuple[int, dict[str, int]] | None = None
        for _ in range(40):
            row = {name: rng.randrange(len(values)) for name, values in factors.items()} | dict(wanted)
            if valid({name: factors[name][i] for name, i in row.items()}):
                gain = sum(pair in open_pairs for pair in itertools.combinations(row.items(), 2))
                if best is None or gain > best[0]:
                    best = gain, row
        if best is None:
            open_pairs.discard(wanted)
            continue
        open_pairs -= set(itertools.combinations(best[1].items(), 2))
        rows.append({name: factors[name][i] for name, i in best[1].items()})
    return rows
