"""Pictures of patterns without any library: a PNG of shades, and an SVG around it with words on its axes.

One colour in many opacities, so that a picture reads on light and on dark paper.
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Sequence

from torch import Tensor

INK = (47, 111, 222)
FLOOR = 0.18  # the least opacity of a cell that is read at all: single tokens in a long text must be seen


def png(shares: Tensor, ink: tuple[int, int, int] = INK) -> bytes:
    """Shares [rows, columns] in [0, 1] as a PNG: one pixel per cell, the share is its opacity.

    Example:
        >>> import torch
        >>> png(torch.eye(2))[1:4]
        b'PNG'
    """
    rows, columns = shares.shape
    shown = shares.clamp(0, 1)
    alpha = ((FLOOR + (1 - FLOOR) * shown) * (shown > 0) * 255).round().int().tolist()
    raw = b"".join(b"\0" + b"".join(bytes((*ink, a)) for a in row) for row in alpha)
    head = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def figure(panels: Sequence[tuple[str, str, Tensor]], across: str, marks: Sequence[float] = (), label: str = "") -> str:
    """Panels side by side, two to a row, as one inline SVG.

    Args:
        panels: (title, what the rows are, shares [rows, columns]).
        across: what the columns are.
        marks: places along the columns (0 to 1) with a small triangle under them.
        label: what the picture shows, for screen readers.
    """
    side, gap, left, top, foot = 220, 26, 22, 22, 40
    wide = min(2, len(panels))
    tall = -(-len(panels) // wide)
    width = left + wide * side + (wide - 1) * gap + 4
    step = top + side + foot
    parts = []
    for at, (title, down, shares) in enumerate(panels):
        x, y = left + at % wide * (side + gap), at // wide * step + top
        data = base64.b64encode(png(shares)).decode()
        parts.append(
            f'<text x="{x}" y="{y - 7}" class="t">{html.escape(title)}</text>'
            f'<image x="{x}" y="{y}" width="{side}" height="{side}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
            f'<rect x="{x}" y="{y}" width="{side}" height="{side}" class="f"/>'
        )
        for mark in marks:
            cx = x + mark * side
            parts.append(f'<path d="M{cx:.1f} {y + side + 2}l4 8h-8z" class="m"/>')
        parts.append(
            f'<text x="{x + side}" y="{y + side + 24}" class="a" text-anchor="end">{html.escape(across)}</text>'
        )
        parts.append(
            f'<text transform="translate({x - 7} {y + side}) rotate(-90)" class="a">{html.escape(down)}</text>'
        )
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width} {tall * step - 8}" role="img" aria-label="{html.escape(label, quote=True)}" '
        f'style="max-width:{width}px">{body}</svg>'
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
