"""Score against cost: a dot per method with its interval, and the line of those that none beats in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from saccade.evaluate.report.drawing import CHAR, Drawing

WIDTH, HEIGHT = 360, 290
LEFT, RIGHT, TOP, BOTTOM = 34, 12, 14, 40
LETTERS = 11


class Point(NamedTuple):
    """A method: its cost, its score between 0 and 1, and the ends of the score's interval."""

    name: str
    look: str
    cost: float
    score: float
    low: float | None
    high: float | None


def pareto(points: Sequence[Point], across: str, form: Callable[[float], str], label: str) -> Drawing:
    """Draw methods by cost (logarithmic, less is better) and score.

    Args:
        points: the methods; those whose look is "control" are on no front.
        across: what the cost is.
        form: the cost in words.
        label: for screen readers.
    """
    sheet = Drawing(WIDTH, HEIGHT, label)
    low, high = _range([point.cost for point in points])

    def x_of(cost: float) -> float:
        return LEFT + (math.log(cost) - math.log(low)) / math.log(high / low) * (WIDTH - LEFT - RIGHT)

    def y_of(score: float) -> float:
        return TOP + (1 - score) * (HEIGHT - TOP - BOTTOM)

    for score in (0.0, 0.25, 0.5, 0.75, 1.0):
        sheet.line([(LEFT, y_of(score)), (WIDTH - RIGHT, y_of(score))], "line")
        sheet.text(LEFT - 5, y_of(score) + 4, f"{score:g}", "soft", "end")
    for tick in _ticks(low, high):
        sheet.line([(x_of(tick), y_of(0)), (x_of(tick), y_of(0) + 4)], "soft")
        sheet.text(x_of(tick), y_of(0) + 16, form(tick), "soft", "middle")
    sheet.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, f"{across}, logarithmic; left is better", "soft", "middle")
    best = front([point for point in points if point.look != "control"])
    steps: list[tuple[float, float]] = []
    for point in best:
        steps += [(x_of(point.cost), steps[-1][1])] if steps else []
        steps.append((x_of(point.cost), y_of(point.score)))
    if len(steps) > 1:
        sheet.line(steps, "method", 1.5)
    taken = [_box(x_of(p.cost) - 5, y_of(p.score) - 5, 10, 10) for p in points]
    taken += [_box(a, b - 1, c - a, 2) for (a, b), (c, d) in pairwise(steps) if b == d]
    for point in points:
        x = x_of(point.cost)
        if point.low is not None and point.high is not None:
            sheet.line([(x, y_of(point.low)), (x, y_of(point.high))], point.look, 1.2)
            taken.append(_box(x - 2, y_of(point.high), 4, y_of(point.low) - y_of(point.high)))
    for point in points:
        ends = "" if point.low is None else f", 95 % {point.low:.2f} to {point.high:.2f}"
        hint = f"{point.name}: {point.score:.2f}{ends}, {form(float(f'{point.cost:.3g}'))}"
        sheet.dot(x_of(point.cost), y_of(point.score), 5, point.look, hint)
    for point in sorted(points, key=lambda point: point.cost):
        _name(sheet, taken, x_of(point.cost), y_of(point.score), point)
    return sheet


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, cheap ones first.

    Example:
        >>> [p.name for p in front([Point("a", "", 1, 0.5, None, None), Point("b", "", 2, 0.4, None, None)])]
        ['a']
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.score)):
        if not found or point.score > found[-1].score:
            found.append(point)
    return found


def _name(sheet: Drawing, taken: list[tuple[float, float, float, float]], x: float, y: float, point: Point) -> None:
    """Write a method's name beside its dot, where nothing stands yet."""
    name = point.name if len(point.name) <= 24 else f"{point.name[:23]}…"
    wide = len(name) * LETTERS * CHAR
    for at_x, at_y in _around(x, y, wide):
        box = _box(at_x, at_y - LETTERS + 1, wide, LETTERS + 2)
        inside = at_x >= LETTERS / 2 and at_x + wide <= WIDTH - 2 and LETTERS <= at_y <= HEIGHT - BOTTOM - 2
        if inside and not any(_touch(box, other) for other in taken):
            break
    else:
        return  # no room: the table and the hint under the pointer still name it
    taken.append(box)
    if abs(at_y - y) > 18:
        sheet.line(
            [(x, y), (max(min(x, at_x + wide), at_x), at_y - LETTERS + 1 if at_y > y else at_y + 2)], "soft", 0.6
        )
    sheet.text(at_x, at_y, name, "soft" if point.look == "control" else "ink", height=LETTERS, kind="halo")


def _around(x: float, y: float, wide: float) -> Iterator[tuple[float, float]]:
    for down in (4, 17, -9, 30, -22, 43, 56, 69, 82, 95, 108, 121, 134, 147, 160, -35, -48, -61, -74, -87, -100):
        for left in (x + 9, x - 9 - wide, x - wide / 2):
            if left != x - wide / 2 or abs(down) > 8:
                yield left, y + down


def _box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
    return x, y, x + w, y + h


def _touch(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _range(costs: Sequence[float]) -> tuple[float, float]:
    """Ends of the axis: some room on both sides, and never less than a doubling."""
    low, high = min(costs), max(costs)
    room = max((high / low) ** 0.08, math.sqrt(max(1.0, 2 * low / high)))
    return low / room, high * room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within the axis, at most six."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1)
    for steps in (range(1, 10), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(found) <= 6:
            return found
    return found[:: -(-len(found) // 6)]
