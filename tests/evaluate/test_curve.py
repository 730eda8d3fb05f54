"""Break-even lengths, budget curves and their areas against hand-made rows and a fine numerical sum."""

import math
import random

import pytest

from saccade.evaluate.curve import area, break_even_length, budget_curve


def row(method, length, score=0.5, task="kv", **more):
    return {"method": method, "task": task, "length": length, "score": score, "n": 10, "density": 0.5} | more


def timed(method, times, task="kv"):
    return [row(method, length, task=task, ttft_s=seconds) for length, seconds in times.items()]


def test_break_even_is_where_fitted_powers_meet():
    # dense c N^2, the method d N: ratios on one straight line of logarithms, which cross 1 at d / c
    lengths = [700, 1500, 4096, 9000]
    dense = timed("dense", {n: 1e-6 * n * n for n in lengths})
    fast = timed("fast", {n: 3e-3 * n for n in lengths})
    assert break_even_length(dense + fast, "fast") == pytest.approx(3000, abs=1)


def test_break_even_takes_the_last_crossing_and_the_median_task():
    dense = timed("dense", dict.fromkeys((1000, 2000, 4000, 8000), 1.0))
    wavy = timed("wavy", {1000: 0.5, 2000: 2.0, 4000: 2.0, 8000: 0.5})
    assert break_even_length(dense + wavy, "wavy") == round(math.sqrt(4000 * 8000))
    for seconds, want in (((0.5, 0.5, 9.0), 4000), ((0.5, 2.0, 2.0), None)):
        tasks = list(zip("abc", seconds, strict=True))
        many = [r for t, s in tasks for r in timed("dense", {4000: 1.0}, t) + timed("m", {4000: s}, t)]
        assert break_even_length(many, "m") == want


@pytest.mark.parametrize("last", [1.5, 1.0001])
def test_no_break_even_where_it_is_slower_at_the_end(last):
    rows = timed("dense", {1000: 1.0, 2000: 1.0}) + timed("m", {1000: 0.5, 2000: last})
    assert break_even_length(rows, "m") is None


def test_no_break_even_without_times():
    rows = [*timed("dense", {1000: 1.0}), row("m", 1000, ttft_s=None), row("m", 2000, ttft_s=0.5)]
    assert break_even_length(rows, "m") is None
    assert break_even_length([], "m") is None


def test_area_is_the_mean_over_log_budget():
    rng = random.Random(3)
    points = [(10 ** rng.uniform(-3, 0), rng.random()) for _ in range(7)]
    low, high = min(b for b, _ in points), max(b for b, _ in points)
    for ends in ((low, high), (low * 1.7, high / 1.3)):
        # a fine sum over equal steps of the logarithm
        steps, total = 20000, 0.0
        line = sorted(points)
        for i in range(steps):
            x = math.log(ends[0]) + (i + 0.5) / steps * math.log(ends[1] / ends[0])
            at = max(j for j in range(6) if math.log(line[j][0]) <= x)
            x0, x1 = math.log(line[at][0]), math.log(line[at + 1][0])
            total += line[at][1] + (line[at + 1][1] - line[at][1]) * (x - x0) / (x1 - x0)
        assert area(points, *ends) == pytest.approx(total / steps, abs=1e-4)
    assert area(points) == area(points, low, high)


def test_area_knows_nothing_beyond_its_points():
    line = [(0.1, 0.2), (0.2, 0.8)]
    assert area(line, low=0.05) is None and area(line, high=0.5) is None
    assert area(line, low=0.2) is None and area(line[:1]) is None and area([]) is None
    assert area([(0.1, 0.0), (0.1, 1.0), (0.2, 0.5)]) == pytest.approx(0.5)


def test_curve_takes_tasks_that_all_budgets_share():
    rows = [
        row("quest@0.1", 4096, 0.6, "a", density=0.16),
        row("quest@0.05", 4096, 0.2, "a", density=0.11),
        row("quest@0.05", 4096, 0.4, "b", density=None),
        row("quest@0.05", 8192, 0.9, "a"),
        row("quest+duo@0.1", 4096, 0.9, "a"),
        row("quest@x.json", 4096, 0.9, "a"),
        row("quest", 4096, 0.9, "a"),
        row("dense", 4096, 1.0, "a", density=1.0),
        row("dense", 4096, 0.0, "b", density=1.0),
        row("quest@0.1", 4096, 3.0, "c", unit="bits per byte"),
        row("quest@0.05", 4096, 3.0, "c", unit="bits per byte"),
    ]
    found = budget_curve(rows, "quest", 4096)
    assert [(p.share, p.density, p.score, p.n) for p in found] == [
        (0.05, 0.11, 0.2, 10),
        (0.1, 0.16, 0.6, 10),
        (1, 1, 1, 10),
    ]
    assert all(p.low <= p.score <= p.high for p in found)
    rows += [row("quest@0.1", 4096, 0.5, "b")]
    assert [(p.share, p.score, p.n) for p in budget_curve(rows, "quest", 4096)] == [
        (0.05, pytest.approx(0.3), 20),
        (0.1, pytest.approx(0.55), 20),
        (1.0, 0.5, 20),
    ]
    assert budget_curve(rows, "tidal", 4096) == [] and budget_curve(rows, "quest", 16384) == []


def test_a_row_at_share_one_takes_the_place_of_dense():
    rows = [row("m@1.0", 100, 0.3), row("m@0.5", 100, 0.2), row("dense", 100, 1.0)]
    assert [p.score for p in budget_curve(rows, "m", 100)] == [0.2, 0.3]
