"""A drawing of a few kinds of shapes, written once and shown twice: as SVG, and as PNG by matplotlib.

Shapes have the name of a look, not a colour: the page gives each look a colour for light and one for dark paper.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# look -> (light, dark); what a page or a file that stands alone colours its drawings by
LOOKS = {
    "ink": ("#1d2126", "#e7e9eb"),
    "soft": ("#5c6670", "#a0a8b0"),
    "line": ("#dcdfe3", "#333a41"),
    "paper": ("#fdfdfb", "#14171a"),
    "method": ("#2f6fde", "#6ea0f5"),
    "control": ("#8a929b", "#7d868f"),
    "dense": ("#1d2126", "#e7e9eb"),
    "failed": ("#c2341d", "#ff8a72"),
    "select": ("#c9780a", "#e9ad55"),
    "copy": ("#8352cf", "#b595ee"),
    "gain": ("#1a7f4b", "#58c48c"),
}
HALO = ".halo{paint-order:stroke;stroke:var(--sheet,var(--paper));stroke-width:3px;stroke-linejoin:round}"
CHAR = 0.56  # width of a letter, as a share of its height


@dataclass
class Drawing:
    """Shapes on a sheet, the origin at the upper left.

    Args:
        width, height: of the sheet.
        label: what it shows, for screen readers.

    Example:
        >>> sheet = Drawing(10, 10, "a dot")
        >>> sheet.dot(5, 5, 2, "method")
        >>> "circle" in sheet.svg()
        True
    """

    width: float
    height: float
    label: str
    shapes: list[tuple[Any, ...]] = field(default_factory=list)

    def line(self, points: Iterable[tuple[float, float]], look: str, width: float = 1.0) -> None:
        """A line through points."""
        self.shapes.append(("line", list(points), look, width))

    def rect(
        self, x: float, y: float, w: float, h: float, look: str, share: float = 1.0, hint: str = "", edge: str = ""
    ) -> None:
        """A filled rectangle of some opacity, with a hint under the pointer and an edge of another look."""
        self.shapes.append(("rect", x, y, max(w, 0.0), h, look, share, hint, edge))

    def dot(self, x: float, y: float, radius: float, look: str, hint: str = "") -> None:
        """A filled circle."""
        self.shapes.append(("dot", x, y, radius, look, hint))

    def text(
        self,
        x: float,
        y: float,
        words: str,
        look: str = "ink",
        anchor: str = "start",
        height: float = 11,
        kind: str = "",
    ) -> None:
        """Words on a base line; anchor is start, middle or end; kind is "", "bold" or "halo" (over lines)."""
        self.shapes.append(("text", x, y, words, look, anchor, height, kind))

    def svg(self, alone: bool = False) -> str:
        """As SVG; `alone` makes it a file of its own, with its colours inside."""
        body = "".join(_svg(shape) for shape in self.shapes)
        size = f'viewBox="0 0 {self.width:g} {self.height:g}"'
        label = f'role="img" aria-label="{html.escape(self.label, quote=True)}"'
        if not alone:
            return f'<svg {size} {label} style="max-width:{1.5 * self.width:g}px">{body}</svg>'
        sheet = f'<rect width="{self.width:g}" height="{self.height:g}" class="f-paper"/>'
        return stand_alone(f"<svg {size} {label}>{sheet}{body}</svg>", self.width, self.height)

    def png(self, figure: Any) -> Any:
        """Draw on an empty matplotlib figure of the sheet's proportions; gives it back."""
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set_xlim(0, self.width)
        axis.set_ylim(self.height, 0)
        axis.set_axis_off()
        points = 72 * figure.get_size_inches()[0] / self.width
        for shape in self.shapes:
            _paint(axis, shape, points)
        return figure


def looks_css() -> str:
    """The colours of all looks, light and dark."""
    light, dark = ("".join(f"--{name}:{pair[at]};" for name, pair in LOOKS.items()) for at in (0, 1))
    rules = "".join(f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in LOOKS)
    night = f"@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"
    return f":root{{{light}}}{night}{rules}svg text{{font-family:system-ui,sans-serif}}{HALO}"


def stand_alone(svg: str, width: float, height: float, css: str = "") -> str:
    """An inline SVG as a file of its own."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
    style = f"<style>{looks_css()}{css}</style>"
    start, rest = svg.split(">", 1)
    return f"{head}{start.removeprefix('<svg ')}>{style}{rest}\n"


def _svg(shape: tuple[Any, ...]) -> str:
    kind, *rest = shape
    if kind == "line":
        points, look, width = rest
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        return f'<polyline points="{path}" fill="none" class="s-{look}" stroke-width="{width:g}"/>'
    if kind == "rect":
        x, y, w, h, look, share, hint, edge = rest
        stroke = f" s-{edge}" if edge else ""
        faint = "" if share >= 1 else f' fill-opacity="{share:.3f}"'
        place = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"'
        return f'<rect {place} class="f-{look}{stroke}"{faint}{_hint(hint, "rect")}'
    if kind == "dot":
        x, y, radius, look, hint = rest
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="f-{look}"{_hint(hint, "circle")}'
    x, y, words, look, anchor, height, how = rest
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    weight = ' font-weight="600"' if how == "bold" else ""
    halo = " halo" if how == "halo" else ""
    said = html.escape(words, quote=False)
    return f'<text x="{x:.1f}" y="{y:.1f}" class="f-{look}{halo}" font-size="{height:g}"{place}{weight}>{said}</text>'


def _hint(hint: str, tag: str) -> str:
    return f"><title>{html.escape(hint, quote=False)}</title></{tag}>" if hint else "/>"


def _paint(axis: Any, shape: tuple[Any, ...], points: float) -> None:
    from matplotlib.patches import Circle, Rectangle

    kind, *rest = shape
    if kind == "line":
        line, look, width = rest
        axis.plot([x for x, _ in line], [y for _, y in line], color=LOOKS[look][0], linewidth=width * points)
    elif kind == "rect":
        x, y, w, h, look, share, _, edge = rest
        axis.add_patch(Rectangle((x, y), w, h, facecolor=LOOKS[look][0], alpha=share, linewidth=0))
        if edge:
            axis.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=LOOKS[edge][0], linewidth=points))
    elif kind == "dot":
        x, y, radius, look, _ = rest
        axis.add_patch(Circle((x, y), radius, color=LOOKS[look][0]))
    else:
        x, y, words, look, anchor, height, how = rest
        side = {"start": "left", "middle": "center", "end": "right"}[anchor]
        # a dollar sign would start a formula
        axis.text(
            x,
            y,
            words.replace("$", r"\$"),
            color=LOOKS[look][0],
            ha=side,
            va="baseline",
            fontsize=height * points * 0.97,
            fontweight="bold" if how == "bold" else "normal",
        )
