"""Verdicts against brute force: every way the coins could have fallen, every way the samples could have been drawn."""

import itertools
import random

import pytest
import torch

from saccade.evaluate.significance import BETTER, EVEN, SAME, WORSE, against, verdict


def flipped(ours, theirs):
    """Share of all exchanges of the two sides, sample by sample, that differ at least as much: exact, two-sided."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    sums = [
        abs(sum(s * g for s, g in zip(signs, gaps, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(gaps))
    ]
    return sum(total >= abs(sum(gaps)) - 1e-9 for total in sums) / len(sums)


@pytest.mark.parametrize("seed", range(6))
def test_right_or_wrong_is_the_exact_test_of_exchanged_sides(seed):
    source = random.Random(seed)
    ours = [float(source.random() < 0.3) for _ in range(13)]
    theirs = [float(source.random() < 0.9) for _ in range(13)]
    assert verdict(ours, theirs).found.p == pytest.approx(flipped(ours, theirs), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_part_scores_are_drawn_again_in_every_way(seed):
    source = random.Random(seed)
    theirs = [source.random() for _ in range(6)]
    ours = [x + source.gauss(0.1, 0.15) for x in theirs]
    gaps = torch.tensor([a - b for a, b in zip(ours, theirs, strict=True)], dtype=torch.float64)
    every = torch.tensor(list(itertools.product(range(6), repeat=6)))
    means = gaps[every].mean(1)
    found = verdict(ours, theirs).found
    # few samples, few sums: an end lies on one of them, with so many below it and so many up to it
    for end, share in ((found.low, 0.025), (found.high, 0.975)):
        below, up_to = (means < end - 1e-9).double().mean(), (means <= end + 1e-9).double().mean()
        assert float(below) - 0.01 <= share <= float(up_to) + 0.01
    p = min(1.0, 2 * min(float((means <= 0).double().mean()), float((means >= 0).double().mean())))
    assert found.p == pytest.approx(p, abs=0.03)


def test_the_sign_is_the_units():
    low, high = [0.2, 0.3, 0.1, 0.25, 0.2, 0.3], [0.9, 0.8, 0.95, 0.7, 0.8, 0.9]
    assert (verdict(low, high).word, verdict(high, low).word) == (WORSE, BETTER)
    assert (verdict(low, high, lower=True).word, verdict(high, low, lower=True).word) == (BETTER, WORSE)
    assert verdict(low, low).word == SAME
    # 5 of 5 lost is p = 0.0625: not enough
    assert (verdict([0] * 5, [1] * 5).word, verdict([0] * 6, [1] * 6).word) == (EVEN, WORSE)
    # the same mean by other samples is not the same
    assert verdict([1, 0], [0, 1]).word == EVEN


def rows_and_samples(scores, unit=None, prompts=("a",)):
    rows = [{"method": m, "task": "t", "length": 9, "unit": unit} for m in scores]
    lines = {
        (m, "t", 9): [{"index": i, "prompt": prompts[i % len(prompts)], "score": s} for i, s in enumerate(values)]
        for m, values in scores.items()
    }
    return rows, lines


def test_every_cell_is_compared_with_dense_on_its_own_prompts():
    rows, lines = rows_and_samples({"dense": [1.0] * 8, "bad": [0.0] * 8, "good": [1.0] * 8})
    assert {cell[0]: one.word for cell, one in against(rows, lines).items()} == {"bad": WORSE, "good": SAME}
    bits, lines = rows_and_samples(
        {"dense": [1.0] * 8, "bad": [2.0 + i / 9 for i in range(8)]}, "bits, lower is better"
    )
    assert [one.word for one in against(bits, lines).values()] == [WORSE]
    lines["bad", "t", 9][3]["prompt"] = "another"
    assert against(bits, lines) == {}
    assert against([rows[1] | {"error": "x"}], rows_and_samples({"dense": [1.0], "bad": [0.0]})[1]) == {}
    assert against(rows[1:], {cell: found for cell, found in lines.items() if cell[0] != "dense"}) == {}
