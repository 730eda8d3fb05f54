"""Differences and their intervals against sums by hand."""

import itertools
import math
import random

import pytest

from saccade.evaluate.metrics import wilson
from saccade.evaluate.report.compare import BOOTSTRAP, MCNEMAR, paired, ratio, unpaired


def binomial(n, k):
    return math.factorial(n) / math.factorial(k) / math.factorial(n - k) / 2**n


@pytest.mark.parametrize(
    "won, lost, both, none", [(6, 0, 1, 1), (0, 5, 3, 2), (3, 4, 2, 0), (0, 0, 8, 0), (10, 2, 5, 3)]
)
def test_mcnemar_is_the_sign_test_of_the_samples_that_differ(won, lost, both, none):
    pairs = [(1, 0)] * won + [(0, 1)] * lost + [(1, 1)] * both + [(0, 0)] * none
    random.Random(won).shuffle(pairs)
    found = paired(*map(list, zip(*pairs, strict=True)))
    odd = won + lost
    tail = sum(binomial(odd, k) for k in range(odd + 1) if abs(k - odd / 2) >= abs(won - odd / 2) - 1e-9)
    assert found.how == MCNEMAR and found.n == len(pairs)
    assert found.p == pytest.approx(min(1.0, tail))
    assert found.delta == pytest.approx((won - lost) / len(pairs))
    assert found.low <= found.delta <= found.high


def test_the_paired_interval_covers_the_truth():
    """Exact coverage, summed over every outcome of 12 samples, for several true probabilities."""
    n = 12
    for p_won, p_lost, p_both in ((0.3, 0.1, 0.5), (0.05, 0.05, 0.85), (0.2, 0.2, 0.3), (0.0, 0.25, 0.7)):
        p_none, covered = 1 - p_won - p_lost - p_both, 0.0
        for won, lost, both in itertools.product(range(n + 1), repeat=3):
            none = n - won - lost - both
            if none < 0:
                continue
            chance = math.factorial(n) * p_won**won * p_lost**lost * p_both**both * p_none**none
            chance /= math.prod(map(math.factorial, (won, lost, both, none)))
            ours = [1] * won + [0] * lost + [1] * both + [0] * none
            theirs = [0] * won + [1] * lost + [1] * both + [0] * none
            found = paired(ours, theirs)
            covered += chance * (found.low <= p_won - p_lost <= found.high)
        assert 0.93 <= covered <= 1 + 1e-9, (p_won, p_lost, p_both, covered)


def test_all_right_on_both_sides_still_has_a_width():
    found = paired([1.0] * 8, [1.0] * 8)
    edge = 1 - wilson(8, 8)[0]
    assert (found.low, found.high) == pytest.approx((-edge, edge)) and not found.sure


def test_bootstrap_of_part_scores_is_near_the_normal_interval():
    source = random.Random(5)
    theirs = [source.random() for _ in range(200)]
    ours = [x + source.gauss(0.05, 0.2) for x in theirs]
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(gaps) / 200
    half = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in gaps) / 199 / 200)
    found = paired(ours, theirs)
    assert found.how == BOOTSTRAP and found.delta == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert paired(ours, theirs) == found
    assert paired(theirs, ours).delta == pytest.approx(-mean)


def test_few_part_scores_say_nothing_of_their_width():
    found = paired([0.5, 0.75, 0.5, 1.0], [0.25, 0.5, 0.25, 0.75])
    assert found.delta == 0.25 and found.low is None and found.p is None and not found.sure


def test_unpaired_is_newcombes_interval_of_two_shares():
    """56 of 70 against 48 of 80: 0.0524 to 0.3339 (Newcombe 1998, method 10)."""
    found = unpaired((56 / 70, *wilson(56, 70)), (48 / 80, *wilson(48, 80)), 70)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)
    assert found.sure and found.p is None
    assert unpaired((1.2, None, None), (1.0, 0.9, 1.1), 3).low is None


def test_ratio_is_the_geometric_mean():
    slow, fast = [2.0, 4.0, 9.0], [1.0, 1.0, 3.0]
    times, low, high = ratio(slow, fast)
    assert times == pytest.approx((2 * 4 * 3) ** (1 / 3)) and 2 <= low <= times <= high <= 4
