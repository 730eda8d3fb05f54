"""Where the time goes: a bar per method, cut into choosing, attending, copying keys and values, and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from saccade.evaluate.report.drawing import CHAR, Drawing
from saccade.evaluate.report.words import percent, seconds

WIDTH, TOP, STEP, THICK = 340, 46, 34, 11
# part of a waterfall -> (what it is called, its look)
PARTS = {
    "select": ("choosing", "select"),
    "attend": ("attention", "method"),
    "copy": ("copying", "copy"),
    "rest": ("the rest", "control"),
}


class Stack(NamedTuple):
    """A method and its seconds by part; None where they were not measured."""

    name: str
    parts: Mapping[str, float] | None


def stacks(rows: Sequence[Stack], title: str) -> Drawing:
    """Draw a bar per method, all on one scale, with a legend above them.

    Example:
        >>> parts = {"select": 0.1, "attend": 0.3, "copy": 0.1, "rest": 0.5}
        >>> sheet = stacks([Stack("minference", parts), Stack("dense", None)], "Prefill")
        >>> "1.00 s, attention 30%" in sheet.svg(), "not measured" in sheet.svg()
        (True, True)
    """
    sheet = Drawing(WIDTH, TOP + STEP * len(rows), title)
    sheet.text(0, 13, title, kind="bold", height=13)
    at = 0.0
    for words, look in PARTS.values():
        sheet.rect(at, 24, 8, 8, look)
        sheet.text(at + 11, 32, words, "soft", height=10)
        at += 20 + len(words) * 10 * CHAR
    totals = [sum(row.parts.values()) for row in rows if row.parts is not None]
    most = max(totals, default=1.0) or 1.0
    for number, (name, parts) in enumerate(rows):
        y = TOP + number * STEP + 10
        sheet.text(0, y, name if len(name) < 30 else f"{name[:29]}…", height=12)
        if parts is None:
            sheet.text(WIDTH, y, "not measured", "failed", "end", 11)
            continue
        total = sum(parts.values())
        share = parts.get("attend", 0.0) / total if total else 0.0
        sheet.text(WIDTH, y, f"{seconds(total)}, attention {percent(share)}", "soft", "end", 11)
        x = 0.0
        for key, (words, look) in PARTS.items():
            value = parts.get(key, 0.0)
            wide = WIDTH * value / most
            sheet.rect(x, y + 5, wide, THICK, look, hint=f"{name}: {words} {seconds(value)}")
            x += wide
    return sheet
