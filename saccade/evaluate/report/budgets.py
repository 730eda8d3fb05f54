"""Score against budget: a line per method that was run with several shares (`NAME@SHARE`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from saccade.evaluate.report.drawing import CHAR, Drawing
from saccade.evaluate.report.words import percent

WIDTH, HEIGHT = 360, 270
LEFT, RIGHT, TOP, BOTTOM = 34, 84, 14, 40


class Spent(NamedTuple):
    """What was read, as a share of dense, and the score between 0 and 1."""

    share: float
    score: float


def parted(method: str) -> tuple[str, float | None]:
    """The name of a method and the share after its @, if it has one.

    Example:
        >>> parted("quest@0.05"), parted("quest")
        (('quest', 0.05), ('quest', None))
    """
    name, _, share = method.rpartition("@")
    try:
        return (name, float(share)) if name else (method, None)
    except ValueError:
        return method, None


def budgets(lines: Mapping[str, Sequence[Spent]], looks: Mapping[str, str], label: str) -> Drawing:
    """Draw score against the share that was read (logarithmic), a line per method with its name at its end.

    Args:
        lines: per method its points; those with a single one are drawn as a dot.
        looks: per method the look of its line.
        label: for screen readers.
    """
    sheet = Drawing(WIDTH, HEIGHT, label)
    every = [point.share for points in lines.values() for point in points]
    low, high = min(every) / 1.15, max(max(every), min(every) * 2) * 1.05

    def x_of(share: float) -> float:
        return LEFT + math.log(share / low) / math.log(high / low) * (WIDTH - LEFT - RIGHT)

    def y_of(score: float) -> float:
        return TOP + (1 - score) * (HEIGHT - TOP - BOTTOM)

    for score in (0.0, 0.25, 0.5, 0.75, 1.0):
        sheet.line([(LEFT, y_of(score)), (WIDTH - RIGHT, y_of(score))], "line")
        sheet.text(LEFT - 5, y_of(score) + 4, f"{score:g}", "soft", "end")
    for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        if low <= tick <= high:
            sheet.line([(x_of(tick), y_of(0)), (x_of(tick), y_of(0) + 4)], "soft")
            sheet.text(x_of(tick), y_of(0) + 16, percent(tick), "soft", "middle")
    across = (LEFT + WIDTH - RIGHT) / 2
    sheet.text(across, HEIGHT - 6, "pairs read, of dense; logarithmic", "soft", "middle")
    ends = []
    for name, points in lines.items():
        ordered = sorted(points)
        sheet.line([(x_of(p.share), y_of(p.score)) for p in ordered], looks[name], 1.6)
        for point in ordered:
            hint = f"{name}: {point.score:.2f} reading {percent(point.share)}"
            sheet.dot(x_of(point.share), y_of(point.score), 3.5, looks[name], hint)
        ends.append((y_of(ordered[-1].score), x_of(ordered[-1].share), name))
    at = -math.inf
    for y, x, name in sorted(ends):
        # names below each other where lines end at the same height
        at = max(y + 4, at + 12)
        most = int(RIGHT / (11 * CHAR)) - 1
        sheet.line([(x + 4, y), (WIDTH - RIGHT + 6, at - 4)], "line", 0.8)
        sheet.text(WIDTH - RIGHT + 8, at, name if len(name) <= most else f"{name[: most - 1]}…", looks[name])
    return sheet
