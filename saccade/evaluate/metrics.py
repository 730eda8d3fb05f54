"""Scores with their uncertainty: a mean, its number of samples, and a 95 % Wilson interval.

The other figures of a row are defined where they are made: density, what choosing costs of it, and kept mass in
`saccade.hf.meter`; output error in `look`; KL and agreement in `fidelity`; bytes read, peak memory and the arithmetic
ceiling in `costs`; the waterfall in `waterfall`; what rows say together (break-even length, budget curve and its area)
in `curve`. `fields.measures` makes all that one row has. `docs/metrics.md` lists them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959963984540054


class Score(NamedTuple):
    """A mean score in [0, 1], how many samples it comes from, and the ends of its interval."""

    score: float
    n: int
    low: float
    high: float


def wilson(hits: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval for a share of hits: it stays within [0, 1] and has a width at 0 and at n.

    Args:
        hits: number of hits; a sum of part scores makes the interval a little too wide, never too narrow.
        n: number of samples, at least 1.
        z: standard normal quantile (default: 95 %).

    Example:
        >>> [round(x, 3) for x in wilson(10, 10)], [round(x, 3) for x in wilson(1, 2)]
        ([0.722, 1.0], [0.095, 0.905])
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"wilson: needs n >= 1 and 0 <= hits <= n, got hits {hits}, n {n}")
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # the ends at 0 and n are exact in theory and a rounding error away from it in floats
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == n else middle + half)


def mean_score(scores: Sequence[float]) -> Score:
    """Mean of 0-to-1 scores with its interval.

    Example:
        >>> mean_score([1.0, 1.0, 0.0, 1.0]).score
        0.75
    """
    low, high = wilson(sum(scores), len(scores))
    return Score(sum(scores) / len(scores), len(scores), low, high)
