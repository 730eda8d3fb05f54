"""The same pictures as a PNG file with axes, by matplotlib (an extra, imported when it is asked for)."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from saccade.core.errors import FileError, UnsupportedError


def save_panels(
    path: str | os.PathLike[str],
    panels: Sequence[tuple[str, Tensor]],
    *,
    title: str,
    down: str,
    across: str,
    extent: tuple[float, float] | None = None,
    marks: Sequence[float] = (),
) -> None:
    """Draw panels of shares in [0, 1] side by side and write a PNG; the file is whole or not there.

    Args:
        path: the file, ending in .png.
        panels: (title, shares [rows, columns]).
        title: over all of them.
        down, across: words on the axes.
        extent: numbers at the ends of (across, down); rows and columns are counted where there is none.
        marks: places along the columns, in the units of `extent`, with a small triangle.
    """
    figure = new_figure((1.2 + 3.4 * len(panels), 4.2))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for at, (axis, (name, shares)) in enumerate(zip(axes, panels, strict=True)):
        wide, tall = extent or (shares.shape[1], shares.shape[0])
        axis.imshow(
            shares.clamp(0, 1).sqrt().numpy(),  # the root, because single tokens in a long text must be seen
            cmap="Blues",
            vmin=0,
            vmax=1,
            extent=(0, wide, tall, 0),
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(across, fontsize=8)
        axis.tick_params(labelsize=7)
        if at == 0:
            axis.set_ylabel(down, fontsize=8)
        for mark in marks:
            axis.plot([mark], [tall], marker="^", color="#d9480f", markersize=7, clip_on=False, zorder=3)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def new_figure(size: tuple[float, float], free: bool = False) -> Any:
    """An empty figure of a size in inches; a free one is laid out by whoever draws on it.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("drawing a PNG needs matplotlib: pip install 'saccade[report]'") from None
    return Figure(figsize=size, dpi=140, layout=None if free else "constrained")


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, whole or not at all."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise FileError(f"{path}: pictures are written as .png")
    target.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with tempfile.NamedTemporaryFile("wb", dir=target.parent, delete=False, prefix=".new-") as file:
        file.write(buffer.getvalue())
    os.chmod(file.name, 0o644)
    os.replace(file.name, target)
