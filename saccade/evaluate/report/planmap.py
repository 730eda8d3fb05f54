"""A plan as a picture: layers down, heads across, a colour per method."""

from __future__ import annotations

import os

from saccade.core.plan import PHASES, Plan
from saccade.evaluate.report.plot import new_figure, save


def save_map(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw the phases in which a plan says anything side by side and write a PNG."""
    names = list(dict.fromkeys(a.method for row in plan.layers for a in row))
    used = [phase for phase in PHASES if any(a.phase == phase for row in plan.layers for a in row)] or [PHASES[0]]
    figure = new_figure((1.6 + 3.2 * len(used), 1.8 + min(8.0, 0.16 * plan.model.layers)))
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    palette = ["#e6e8ea", "#2f6fde", "#1a9f5b", "#e0a100", "#8a4fd0", "#00a2b5", "#d9480f", "#777777"]
    colours = [palette[0], *(palette[1 + i % (len(palette) - 1)] for i in range(len(names)))]
    for axis, phase in zip(figure.subplots(1, len(used), squeeze=False)[0], used, strict=True):
        count = plan.model.kv_heads if phase == "cache" else plan.model.heads
        cells = [[0] * count for _ in plan.layers]
        for at in range(plan.model.layers):
            for assign in plan.phase(at, phase):
                for head in range(count) if assign.heads is None else assign.heads:
                    cells[at][head] = 1 + names.index(assign.method)
        axis.imshow(cells, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5, aspect="auto")
        axis.set_title(phase, fontsize=10)
        axis.set_xlabel("key head" if phase == "cache" else "query head", fontsize=8)
        axis.set_ylabel("layer", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.get_major_locator().set_params(integer=True)
    legend = [
        Patch(color=colour, label=name) for colour, name in zip(colours, ["dense, all kept", *names], strict=True)
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=min(4, len(legend)), fontsize=8)
    save(figure, path)
