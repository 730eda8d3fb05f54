"""Bits per byte by position in the text, where rows have them: a table per task and length."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from saccade.evaluate.report.folder import Folder
from saccade.evaluate.report.tables import Cell, sheet
from saccade.evaluate.report.words import tokens


def positions_tables(folders: Sequence[Folder]) -> str:
    """Methods down, positions across; nothing where no row has positions."""
    found: dict[tuple[str, int], list[tuple[str, list[Any]]]] = {}
    for folder in folders:
        for row in folder.rows:
            if _is_bins(row.get("by_position")):
                name = row["method"] if len(folders) == 1 else f"{row['method']}, {folder.name}"
                found.setdefault((row["task"], row["length"]), []).append((name, row["by_position"]))
    parts = []
    for at, ((task, length), rows) in enumerate(found.items()):
        heads = list(dict.fromkeys((low, high) for _, bins in rows for low, high, _ in bins))
        cells = [
            [Cell(name, name), *(_bits({(low, high): v for low, high, v in bins}.get(head)) for head in heads)]
            for name, bins in rows
        ]
        title = f"{task} at {tokens(length)} tokens, by position"
        names = ["Method", *(f"{tokens(low)} to {tokens(high)}" for low, high in heads)]
        table = sheet(f"positions-{at}", title, names, cells)
        parts.append(f"<details><summary>{html.escape(title)}</summary>{table}</details>")
    return "\n".join(parts)


def _bits(value: float | None) -> Cell:
    return Cell("-") if value is None else Cell(f"{value:.3f}", value)


def _is_bins(value: Any) -> bool:
    def fits(line: Any) -> bool:
        return (
            isinstance(line, list)
            and len(line) == 3
            and all(isinstance(edge, int) for edge in line[:2])
            and (line[2] is None or isinstance(line[2], (int, float)))
        )

    return isinstance(value, list) and bool(value) and all(map(fits, value))
