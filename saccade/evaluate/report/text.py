"""Pictures of patterns for a terminal: shades of blocks, at most 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHADES = " ░▒▓█"
UNREAD = "·"
COLUMNS = 64


def draw(
    shares: Tensor, down: str, across: str, causal: bool = True, rows: int = 32, marks: Sequence[float] = ()
) -> str:
    """Shares [rows, columns] in [0, 1] as lines of shades.

    Args:
        shares: the picture.
        down: what the rows are, in a few words.
        across: what the columns are.
        causal: the upper right half is the future, left blank; what may be read and is not is a dot.
        rows: most lines.
        marks: places along the columns, 0 to 1, with a triangle in the lower border.

    Example:
        >>> print(draw(torch.eye(2), "queries", "keys"))
          keys ->
         ┌──┐
        q│█ │
        u│·█│
        e└──┘
    """
    height, width = min(rows, shares.shape[0]), min(COLUMNS, shares.shape[1])
    small = torch.nn.functional.adaptive_avg_pool2d(shares[None].float(), (height, width))[0].tolist()
    label = (down + " " * height)[: max(height + 1, 0)]
    lines = [f"  {across} ->", f" ┌{'─' * width}┐"]
    for i, row in enumerate(small):
        # a cell is the future when all of it lies right of the diagonal
        future = [causal and j * height >= (i + 1) * width for j in range(width)]
        cells = "".join(" " if late and not value else _shade(value) for value, late in zip(row, future, strict=True))
        lines.append(f"{label[i]}│{cells}│")
    under = ["─"] * width
    for mark in marks:
        under[min(width - 1, int(mark * width))] = "▲"
    lines.append(f"{label[height]}└{''.join(under)}┘")
    return "\n".join(line.rstrip() for line in lines)


def _shade(value: float) -> str:
    if value <= 0:
        return UNREAD
    return SHADES[1 + min(3, int(value * 4))]
