"""Curves over the rows of an evaluation: break-even length of whole answers, and score against budget with its area."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

from saccade.core.errors import PlanError
from saccade.evaluate.budget import split
from saccade.evaluate.crossover import break_even
from saccade.evaluate.metrics import wilson

Row = Mapping[str, Any]


class Point(NamedTuple):
    """One budget of one method, over all tasks of a length.

    Args:
        share: of dense, as asked for; 1.0 for the dense row.
        density: measured, with what choosing costs; the mean over tasks, None where no row knows it.
        score: mean over tasks.
        n: samples of all tasks together.
        low, high: Wilson's 95 % interval of the score with that n.
    """

    share: float
    density: float | None
    score: float
    n: int
    low: float
    high: float


def break_even_length(rows: Iterable[Row], method: str, time: str = "ttft_s", dense: str = "dense") -> int | None:
    """The length from which on a method is faster than dense in the same evaluation, in tokens.

    At each length the ratio of dense's time to the method's is the median over tasks. The last crossing from slower to
    faster is taken on a straight line between the logarithms of length and ratio.

    Args:
        rows: of an evaluation; those without the time are left out.
        method: its name in the rows.
        time: "ttft_s" (prefill and first token) or "tpot_s" (a further token).
        dense: the name of the rows that it is compared with.

    Returns:
        Tokens; the shortest length where the method is faster at all of them; None where it never crosses, is slower
        again at the longest length, or has nothing to be compared with.

    Example:
        >>> rows = [dict(method=m, task="kv", length=n, ttft_s=t)
        ...         for m, n, t in (("dense", 1024, 1.0), ("dense", 4096, 4.0), ("a", 1024, 2.0), ("a", 4096, 2.0))]
        >>> break_even_length(rows, "a")
        2048
    """
    found: dict[str, dict[tuple[str, int], float]] = {method: {}, dense: {}}
    for row in rows:
        if row["method"] in found and row.get(time):
            found[row["method"]][row["task"], row["length"]] = row[time]
    ratios: dict[int, list[float]] = {}
    for cell, seconds in found[method].items():
        if cell in found[dense]:
            ratios.setdefault(cell[1], []).append(found[dense][cell] / seconds)
    return break_even([{"length": length, "speedup": median(ratios[length])} for length in sorted(ratios)])


def budget_curve(rows: Iterable[Row], method: str, length: int, dense: str = "dense") -> list[Point]:
    """Score against budget of one method at one length: its `NAME@SHARE` rows, and dense as the share 1.

    Only tasks that all budgets of the method share count, so that points differ by budget alone; tasks whose score is
    not within 0 to 1 (`unit`) are left out.

    Args:
        rows: of an evaluation.
        method: the name before the "@".
        length: tokens.
        dense: the name of the rows for a share of 1; they count where the method has no row at 1.

    Returns:
        Points by ascending share; none where the method has no row with a share.
    """
    cells: dict[float, dict[str, Row]] = {}
    full: dict[str, Row] = {}
    for row in rows:
        if row["length"] != length or row.get("score") is None or row.get("unit"):
            continue
        if row["method"] == dense:
            full[row["task"]] = row
            continue
        share = _share(row["method"], method)
        if share is not None:
            cells.setdefault(share, {})[row["task"]] = row
    if not cells:
        return []
    tasks = set.intersection(*(set(found) for found in cells.values()))
    if 1.0 not in cells and tasks and tasks <= set(full):
        cells[1.0] = full
    return [_point(share, [cells[share][task] for task in sorted(tasks)]) for share in sorted(cells) if tasks]


def area(points: Sequence[tuple[float, float]], low: float | None = None, high: float | None = None) -> float | None:
    """The mean of a score over the logarithm of the budget: the area under the curve over the width it spans.

    Between points the score is a straight line in log budget; beyond them nothing is known, and nothing is assumed.

    Args:
        points: (budget, score) with budgets above 0, in any order; equal budgets are averaged.
        low, high: ends of the span; None = the smallest and the largest budget.

    Returns:
        A number between the smallest and the largest score; None for fewer than two budgets, or where the span is empty
        or reaches beyond them.

    Example:
        >>> area([(0.01, 0.0), (0.1, 0.5), (1.0, 1.0)]), area([(0.01, 0.0), (0.1, 0.5), (1.0, 1.0)], low=0.1)
        (0.5, 0.75)
    """
    by_budget: dict[float, list[float]] = {}
    for budget, score in points:
        by_budget.setdefault(budget, []).append(score)
    line = [(math.log(budget), fmean(by_budget[budget])) for budget in sorted(by_budget)]
    if len(line) < 2:
        return None
    start = line[0][0] if low is None else math.log(low)
    end = line[-1][0] if high is None else math.log(high)
    if not line[0][0] <= start < end <= line[-1][0]:
        return None
    inner = [(x, y) for x, y in line if start < x < end]
    path = [(start, _at(line, start)), *inner, (end, _at(line, end))]
    whole = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(path))
    return whole / (end - start)


def _share(name: str, method: str) -> float | None:
    """The share in `METHOD@SHARE`; None for any other name, files with an "@" among them."""
    if not name.startswith(f"{method}@"):
        return None
    try:
        return split(name)[1]
    except PlanError:
        return None


def _at(line: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(line):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    raise ValueError(f"{x} lies beyond the line")


def _point(share: float, rows: Sequence[Row]) -> Point:
    n = sum(row.get("n") or 1 for row in rows)
    score = fmean(row["score"] for row in rows)
    known = [row["density"] for row in rows if row.get("density") is not None]
    return Point(share, fmean(known) if known else None, score, n, *wilson(score * n, n))
