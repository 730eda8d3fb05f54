"""Tables of plain text: aligned columns that fit a width, the last one wrapped."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 100
GAP = 2


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "", width: int = WIDTH) -> str:
    """Rows under a head and a rule.

    Args:
        head: names of the columns.
        rows: cells, as many in each row as in the head.
        align: "l" or "r" per column; missing ones are "l".
        width: where the last column is wrapped.

    Example:
        >>> print(table(["name", "n"], [["dense", "10"], ["duo", "9"]], "lr"))
        name    n
        -----  --
        dense  10
        duo     9
    """
    align = align.ljust(len(head), "l")
    sizes = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    room = width - sum(sizes[:-1]) - GAP * (len(sizes) - 1)
    sizes[-1] = min(sizes[-1], max(room, len(head[-1]), 12))
    lines = [_line(head, sizes, align), _line(["-" * size for size in sizes], sizes, align)]
    for row in rows:
        wrapped = textwrap.wrap(row[-1], sizes[-1]) or [""]
        lines.append(_line([*row[:-1], wrapped[0]], sizes, align))
        lines += [_line([""] * (len(row) - 1) + [more], sizes, align) for more in wrapped[1:]]
    return "\n".join(lines)


def _line(cells: Sequence[str], sizes: Sequence[int], align: str) -> str:
    padded = [
        cell.rjust(size) if side == "r" else cell.ljust(size)
        for cell, size, side in zip(cells, sizes, align, strict=True)
    ]
    return (" " * GAP).join(padded).rstrip()


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A number in a cell; "-" where there is none.

    Example:
        >>> number(3.14159, ".1f", " s"), number(None)
        ('3.1 s', '-')
    """
    return "-" if value is None else f"{value:{form}}{unit}"


def size(count: float | None) -> str:
    """Bytes for people.

    Example:
        >>> size(33_554_432), size(512)
        ('33.6 MB', '512 B')
    """
    if count is None:
        return "-"
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:.1f} {unit}"
    return f"{count:.0f} B"


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal below ten.

    Example:
        >>> percent(0.0873), percent(1.0), percent(None)
        ('8.7%', '100%', '-')
    """
    if share is None:
        return "-"
    return f"{100 * share:.1f}%" if share < 0.0995 else f"{100 * share:.0f}%"
