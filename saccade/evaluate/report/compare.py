"""Differences with 95 % intervals: on the same samples where they match, of intervals alone where they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from saccade.evaluate.metrics import wilson
from saccade.evaluate.report.words import chance, signed, span

DRAWS = 5_000
FEW = 5  # samples; drawing again from fewer says nothing of how they spread
MCNEMAR, BOOTSTRAP, INTERVALS = "McNemar, exact", "paired bootstrap", "intervals, unpaired"


class Difference(NamedTuple):
    """Ours minus theirs.

    Args:
        delta: the difference of the means.
        low, high: its 95 % interval; None where nothing says how wide it is.
        p: of the test, None where there is only an interval.
        n: pairs of samples, or the fewer samples of the two sides.
        how: which test.
    """

    delta: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    how: str

    @property
    def sure(self) -> bool:
        """Is it a difference: does the interval leave out 0, and does the test agree?"""
        if self.low is None or self.high is None:
            return False
        return (self.low > 0 or self.high < 0) and (self.p is None or self.p < 0.05)

    def told(self) -> str:
        """The difference, its interval, and where that comes from.

        Example:
            >>> paired([0.5] * 6, [0.5] * 6).told()
            'the same score on each of 6 samples'
        """
        if self.p is not None and self.delta == self.low == self.high == 0:
            return f"the same score on each of {self.n} samples"
        test = self.how if self.p is None else f"{self.how}, {chance(self.p)}"
        count = f"{self.n} {'sample' if self.n == 1 else 'samples'}"
        return f"{signed(self.delta)}, 95 % {span(self.low, self.high)}; {test}; {count}"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Two methods on the same samples.

    Scores of 0 and 1 only: McNemar's exact test, and Newcombe's interval for paired shares (Newcombe 1998, "Improved
    confidence intervals for the difference between binomial proportions based on paired data", method 10), which has a
    width even where all samples agree. Others: the percentile bootstrap of the mean difference, 5000 draws with a
    fixed seed; no interval below five samples.

    Example:
        >>> found = paired([1, 1, 1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1])
        >>> found.delta, found.p, found.how
        (0.75, 0.03125, 'McNemar, exact')
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"paired: needs as many samples on both sides, got {len(ours)} and {len(theirs)}")
    if {*ours, *theirs} <= {0, 1}:
        return _shares(ours, theirs)
    return _bootstrap(ours, theirs)


def unpaired(ours: Sequence[float | None], theirs: Sequence[float | None], n: int) -> Difference:
    """Two (mean, low, high): the interval of their difference by square-and-add (Newcombe's for unpaired shares).

    Example:
        >>> found = unpaired((1.0, 0.68, 1.0), (1.0, 0.68, 1.0), 8)
        >>> round(found.low, 2), round(found.high, 2), found.sure
        (-0.32, 0.32, False)
    """
    (a, a_low, a_high), (b, b_low, b_high) = ours, theirs
    assert a is not None and b is not None
    if a_low is None or a_high is None or b_low is None or b_high is None:
        return Difference(a - b, None, None, None, n, INTERVALS)
    low = a - b - math.hypot(a - a_low, b_high - b)
    high = a - b + math.hypot(a_high - a, b - b_low)
    return Difference(a - b, low, high, None, n, INTERVALS)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast, pair by pair: geometric mean of slow / fast, and its bootstrap interval.

    Example:
        >>> [round(x, 2) for x in ratio([2.0, 4.0], [1.0, 2.0])]
        [2.0, 2.0, 2.0]
    """
    logs = torch.tensor([math.log(a / b) for a, b in zip(slow, fast, strict=True)], dtype=torch.float64)
    low, high = _percentiles(_resampled(logs, 1000))
    return math.exp(float(logs.mean())), math.exp(low), math.exp(high)


def _shares(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    n = len(ours)
    won = sum(a > b for a, b in zip(ours, theirs, strict=True))
    lost = sum(a < b for a, b in zip(ours, theirs, strict=True))
    both = sum(a == b == 1 for a, b in zip(ours, theirs, strict=True))
    none = n - won - lost - both
    odd = won + lost
    p = min(1.0, 2 * sum(math.comb(odd, i) for i in range(min(won, lost) + 1)) / 2**odd)
    a, b = both + won, both + lost
    a_low, a_high = wilson(a, n)
    b_low, b_high = wilson(b, n)
    share = a * (n - a) * b * (n - b)
    # corrected for continuity where the answers go together: too much of it would make the interval too narrow
    product = both * none - won * lost
    together = max(product - n / 2, 0.0) if product > 0 else product
    phi = together / math.sqrt(share) if share else 0.0
    delta = (won - lost) / n
    down, up = (a / n - a_low, b_high - b / n), (a_high - a / n, b / n - b_low)
    low = delta - math.sqrt(max(0.0, down[0] ** 2 - 2 * phi * down[0] * down[1] + down[1] ** 2))
    high = delta + math.sqrt(max(0.0, up[0] ** 2 - 2 * phi * up[0] * up[1] + up[1] ** 2))
    return Difference(delta, low, high, p, n, MCNEMAR)


def _bootstrap(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    gaps = torch.tensor([a - b for a, b in zip(ours, theirs, strict=True)], dtype=torch.float64)
    if len(gaps) < FEW:
        return Difference(float(gaps.mean()), None, None, None, len(gaps), BOOTSTRAP)
    means = _resampled(gaps)
    low, high = _percentiles(means)
    # a draw that is exactly 0 speaks for both sides; no more can be said than the draws resolve
    side = min(float((means <= 0).double().mean()), float((means >= 0).double().mean()))
    return Difference(float(gaps.mean()), low, high, min(1.0, max(2 * side, 1 / DRAWS)), len(gaps), BOOTSTRAP)


def _resampled(values: torch.Tensor, draws: int = DRAWS) -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (draws, len(values)), generator=source)
    return values[drawn].mean(1)


def _percentiles(means: torch.Tensor) -> tuple[float, float]:
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high
