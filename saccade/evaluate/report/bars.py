"""Bars: how long each method takes, the shortest bar is the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from saccade.evaluate.report.drawing import Drawing
from saccade.evaluate.report.words import seconds

WIDTH, TOP, STEP, THICK = 340, 26, 34, 9


class Bar(NamedTuple):
    """A method, its look, its seconds (None: failed or not run), and what is said beside them."""

    name: str
    look: str
    value: float | None
    note: str = ""


def bars(rows: Sequence[Bar], title: str) -> Drawing:
    """Draw a bar per method under its name.

    Example:
        >>> sheet = bars([Bar("dense", "dense", 2.0), Bar("duo", "method", None, "failed")], "first token")
        >>> "2.00 s" in sheet.svg(), "failed" in sheet.svg()
        (True, True)
    """
    sheet = Drawing(WIDTH, TOP + STEP * len(rows), title)
    sheet.text(0, 13, title, kind="bold", height=13)
    most = max((row.value for row in rows if row.value is not None), default=1.0)
    for at, (name, look, value, note) in enumerate(rows):
        y = TOP + at * STEP + 12
        sheet.text(0, y, name if len(name) < 34 else f"{name[:33]}…", height=12)
        said = note if value is None else f"{seconds(value)}{f', {note}' if note else ''}"
        sheet.text(WIDTH, y, said, "failed" if value is None else "soft", "end", 12)
        sheet.rect(0, y + 5, WIDTH, THICK, "line", 0.5)
        if value is not None:
            sheet.rect(0, y + 5, max(WIDTH * value / most, 1), THICK, look, hint=f"{name}: {said}")
    return sheet
