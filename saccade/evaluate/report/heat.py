"""Where in the text a fact may stand: mean scores by depth (down) and length (across)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from saccade.evaluate.report.drawing import CHAR, Drawing
from saccade.evaluate.report.folder import Folder
from saccade.evaluate.report.words import tokens

BINS = 10
CROSS, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
WIDTH, LEFT, TOP, ROW = 300, 44, 36, 24


def heat_tasks(folder: Folder) -> list[str]:
    """Tasks with shares as scores whose samples carry depths."""
    units = {row["task"] for row in folder.rows if row.get("unit") is not None}
    deep = {task for (_, task, _), lines in folder.samples.items() if any(x["depth"] is not None for x in lines)}
    return [task for task in dict.fromkeys(row["task"] for row in folder.rows) if task in deep - units]


def heat_map(folder: Folder, method: str, task: str) -> Drawing:
    """The map of a method: a cell's number is its mean score, a cross a cell that failed, a dash nothing run."""
    rows = [row for row in (*folder.rows, *folder.failed) if row["task"] == task]
    lengths = sorted({row["length"] for row in rows})
    every = [x for (_, name, _), lines in folder.samples.items() if name == task for x in lines]
    bands = depth_bands([line["depth"] for line in every if line["depth"] is not None])
    failed = {row["length"] for row in folder.failed if (row["method"], row["task"]) == (method, task)}
    sheet = Drawing(WIDTH, TOP + ROW * len(bands) + 22, f"{method} on {task}: mean score by depth and length")
    wide = min(64.0, (WIDTH - LEFT - 4) / len(lengths))
    sheet.text(0, 12, method if len(method) < 40 else f"{method[:39]}…", kind="bold", height=13)
    for at, length in enumerate(lengths):
        x = LEFT + at * wide
        name = tokens(length) if len(tokens(length)) * 10 * CHAR < wide else f"{length / 1000:.3g}k"
        sheet.text(x + wide / 2, TOP - 5, name, "soft", "middle", 10)
        for down, (low, high) in enumerate(bands):
            y = TOP + down * ROW
            here = [
                line["score"]
                for line in folder.samples.get((method, task, length), [])
                if line["depth"] is not None and low <= line["depth"] <= high
            ]
            _cell(sheet, x, y, wide, here, length in failed, f"{tokens(length)} tokens, depth {_band(low, high)}")
    for down, (low, high) in enumerate(bands):
        sheet.text(LEFT - 6, TOP + down * ROW + ROW / 2 + 4, _band(low, high), "soft", "end", 10)
    sheet.text(LEFT, TOP + ROW * len(bands) + 15, "depth down (0 = start), tokens across", "soft", height=10)
    return sheet


def depth_bands(depths: Sequence[float]) -> list[tuple[float, float]]:
    """The depths themselves where they are few, else ten bands of equal width.

    Example:
        >>> depth_bands([0.2, 0.0, 0.2]), len(depth_bands([i / 100 for i in range(100)]))
        ([(0.0, 0.0), (0.2, 0.2)], 10)
    """
    few = sorted(set(depths))
    if len(few) <= BINS + 1:
        return [(depth, depth) for depth in few]
    edges = [at / BINS for at in range(BINS + 1)]
    # a depth on an edge belongs to the band that starts there; the last band has both its ends
    return [(low, math.nextafter(high, 0) if high < 1 else 1.0) for low, high in pairwise(edges)]


def _cell(sheet: Drawing, x: float, y: float, wide: float, scores: Sequence[float], failed: bool, where: str) -> None:
    words: tuple[Any, ...]
    if scores:
        mean = math.fsum(scores) / len(scores)
        count = f"{math.fsum(scores):g} of {len(scores)}"
        sheet.rect(x, y, wide - 2, ROW - 2, "method", mean, f"{where}: {count}", "line")
        words = f"{mean:.2f}".removesuffix("0").removesuffix(".0"), "paper" if mean > 0.72 else "ink"
    elif failed:
        sheet.rect(x, y, wide - 2, ROW - 2, "paper", 1.0, f"{where}: failed", "failed")
        words = CROSS, "failed"
    else:
        sheet.rect(x, y, wide - 2, ROW - 2, "paper", 1.0, f"{where}: nothing run", "line")
        words = DASH, "soft"
    sheet.text(x + wide / 2 - 1, y + ROW / 2 + 3, *words, anchor="middle", height=11)


def _band(low: float, high: float) -> str:
    return f"{low:.2g}" if low == high else f"{low:.1f}{DASH}{high:.1f}"
