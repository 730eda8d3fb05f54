"""Which pictures an evaluation gives: score against cost, maps of depth and length, times, maps of heads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from saccade.evaluate.curve import area, budget_curve
from saccade.evaluate.presets import CONTROLS, DENSE
from saccade.evaluate.report.bars import Bar, bars
from saccade.evaluate.report.budgets import Spent, budgets, parted
from saccade.evaluate.report.drawing import Drawing, stand_alone
from saccade.evaluate.report.facts import Place, Side, average, faster, is_share, mean_of
from saccade.evaluate.report.folder import Folder
from saccade.evaluate.report.heat import heat_map, heat_tasks
from saccade.evaluate.report.image import figure
from saccade.evaluate.report.pareto import Point, pareto
from saccade.evaluate.report.plot import new_figure, save, save_panels
from saccade.evaluate.report.stack import PARTS, Stack, stacks
from saccade.evaluate.report.words import percent, size, tick, tokens

HUES = ["method", "select", "copy", "gain", "failed", "dense"]
MAPS = 48  # more maps of heads than this on one page would be looked at by nobody
FIGURE_CSS = (
    ".t{font:600 13px system-ui;fill:var(--ink)}"
    ".a{font:11px system-ui;fill:var(--soft)}.f{fill:none;stroke:var(--line)}"
)


@dataclass(frozen=True)
class Picture:
    """A picture of the page that is also a file.

    Args:
        stem: name of the file, without its ending.
        caption: below it on the page.
        group: what it is about; pictures of one group stand together.
        drawing: its shapes; or else
        panels: (title, shares [layers, heads]) side by side.
    """

    stem: str
    caption: str
    group: str
    drawing: Drawing | None = None
    panels: list[tuple[str, Tensor]] = field(default_factory=list)

    def svg(self, alone: bool = False) -> str:
        """For the page, or as a file of its own."""
        if self.drawing is not None:
            return self.drawing.svg(alone)
        inline = figure([(title, "layers", shares) for title, shares in self.panels], "heads", label=self.caption)
        return stand_alone(inline, 500, 290, FIGURE_CSS) if alone else inline

    def save_png(self, path: Path) -> None:
        """By matplotlib.

        Raises:
            UnsupportedError: it is not installed.
        """
        if self.drawing is None:
            save_panels(path, self.panels, title=self.caption[:90], down="layer", across="head")
            return
        save(self.drawing.png(new_figure((self.drawing.width / 72, self.drawing.height / 72), free=True)), path)


def pareto_pictures(folder: Folder) -> Iterator[Picture]:
    """Score against time and against bytes, for each length, long ones first."""
    costs: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("ttft_s", "time to the first token", tick),
        ("kv_bytes", "bytes of keys and values", size),
    )
    for length in reversed(folder.lengths):
        for key, across, form in costs:
            points, left_out = _points(folder, length, key)
            if points:
                label = f"Score against {across} at {tokens(length)} tokens"
                gone = f" Left out, because not all of their cells finished: {', '.join(left_out)}." if left_out else ""
                caption = f"{label}; mean over tasks, with 95 % intervals.{gone}"
                drawing = pareto(points, across, form, label)
                yield Picture(f"{_stem(folder)}-pareto-{key.split('_')[0]}-{length}", caption, _at(length), drawing)


def heat_pictures(folder: Folder) -> Iterator[Picture]:
    """A map per method for each task whose samples carry a depth."""
    for task in heat_tasks(folder):
        for method in folder.methods:
            drawing = heat_map(folder, method, task)
            yield Picture(f"{_stem(folder)}-depth-{_safe(task)}-{_safe(method)}", "", task, drawing)


def bar_pictures(folder: Folder) -> Iterator[Picture]:
    """Times to the first token and per further token, for each length, long ones first."""
    for length in reversed(folder.lengths):
        for key, title in (("ttft_s", "First token"), ("tpot_s", "Each further token")):
            rows = [_bar(Side(folder, method), length, key) for method in folder.methods]
            if any(row.value is not None for row in rows):
                drawing = bars(rows, f"{title}, {tokens(length)} tokens")
                yield Picture(f"{_stem(folder)}-time-{key.split('_')[0]}-{length}", "", _at(length), drawing)


def stack_pictures(folder: Folder) -> Iterator[Picture]:
    """Where the time of a prefill and of a step goes, for each length, long ones first."""
    for length in reversed(folder.lengths):
        for phase, title in (("prefill", "Prefill"), ("decode", "Each further token")):
            rows = [Stack(method, _parts(folder, method, length, phase)) for method in folder.methods]
            if any(row.parts is not None for row in rows):
                drawing = stacks(rows, f"{title}, {tokens(length)} tokens")
                yield Picture(f"{_stem(folder)}-waterfall-{phase}-{length}", "", _at(length), drawing)


def budget_pictures(folder: Folder) -> Iterator[Picture]:
    """Score against what was read, for methods that were run with several shares, long lengths first."""
    names = list(dict.fromkeys(name for name, share in map(parted, folder.methods) if share is not None))
    hues = {name: "control" if name in CONTROLS else HUES[at % len(HUES)] for at, name in enumerate(names)}
    for length in reversed(folder.lengths):
        lines = {name: _spent(folder, name, length) for name in names}
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            label = f"Score against what is read at {tokens(length)} tokens"
            areas = [(name, area(points)) for name, points in lines.items()]
            means = ", ".join(f"{name} {value:.2f}" for name, value in areas if value is not None)
            caption = f"{label}; mean over tasks." + (f" Mean score along the line: {means}." if means else "")
            yield Picture(f"{_stem(folder)}-budget-{length}", caption, _at(length), budgets(lines, hues, label))


def _spent(folder: Folder, method: str, length: int) -> list[Spent]:
    """The budgets of a method, and dense as its end."""
    points = budget_curve(folder.rows, method, length)
    return [Spent(point.share if point.density is None else point.density, point.score) for point in points]


def head_pictures(folder: Folder) -> Iterator[Picture]:
    """Density and kept mass of each layer and head, where heads.jsonl has them."""
    for line in _worth_drawing(folder.heads):
        panels, said = [], []
        for what in ("density", "mass"):
            if line.get(what) is None:
                continue
            known = [cell for row in line[what] for cell in row if cell is not None]
            if not known or (what == "density" and min(known) > 0.999):
                break  # everything is read: nothing to draw
            shares = torch.tensor([[cell or 0.0 for cell in row] for row in line[what]], dtype=torch.float64)
            most, mean = max(known), sum(known) / len(known)
            panels.append((f"{what}, full shade {percent(most)}", (shares / most if most else shares).clamp(0, 1)))
            # what is read most, what is missed most
            word, edge = ("most", most) if what == "density" else ("least", min(known))
            layer, head = next((y, x) for y, row in enumerate(line[what]) for x, v in enumerate(row) if v == edge)
            said.append(f"{what} {percent(mean)} on average, {word} {percent(edge)} in layer {layer}, head {head}")
        if panels:
            name = f"{line['method']} on {line['task']} at {tokens(line['length'])} tokens, {line['phase']}"
            parts = (folder.name, "heads", line["method"], line["task"], str(line["length"]), line["phase"])
            stem = "-".join(map(_safe, parts))
            yield Picture(stem, f"{name}: {'; '.join(said)}.", _at(line["length"]), None, panels)


def _worth_drawing(lines: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """All of them where they are few; else those of the longest length and of the first task that has it."""
    if len(lines) <= MAPS:
        return lines
    longest = max(line["length"] for line in lines)
    task = next(line["task"] for line in lines if line["length"] == longest)
    return [line for line in lines if (line["length"], line["task"]) == (longest, task)]


def _at(length: int) -> str:
    return f"{tokens(length)} tokens"


def look_of(method: str) -> str:
    """Dense and controls stand apart from methods."""
    return "dense" if method == DENSE else "control" if parted(method)[0] in CONTROLS else "method"


def _parts(folder: Folder, method: str, length: int, phase: str) -> dict[str, float] | None:
    """Mean seconds by part, over the tasks where they were measured."""
    found = []
    for row in folder.rows:
        parts = row["waterfall"].get(phase) if isinstance(row.get("waterfall"), dict) else None
        if (row["method"], row["length"]) == (method, length) and isinstance(parts, dict):
            found.append({key: float(parts.get(key) or 0.0) for key in PARTS})
    return {key: fmean(parts[key] for parts in found) for key in PARTS} if found else None


def _points(folder: Folder, length: int, key: str) -> tuple[list[Point], list[str]]:
    """Methods that finished all tasks that at least half of them finished at this length; and what is left out."""
    rows = [row for row in folder.rows if row["length"] == length and is_share(row)]
    here = Counter(row["task"] for row in rows)
    places: list[Place] = [(task, length) for task, count in here.items() if 2 * count >= max(here.values())]
    found, left_out = [], [f"{task} (few did it)" for task in here if (task, length) not in places]
    for method in folder.methods:
        side = Side(folder, method)
        cost = average(side, places, key)
        if not places or any(side.row(place) is None for place in places) or not cost:
            left_out.append(method)
            continue
        score, low, high, _ = mean_of(side, places)
        found.append(Point(method, look_of(method), cost, score, low, high))
    return found, left_out


def _bar(side: Side, length: int, key: str) -> Bar:
    dense = Side(side.folder, DENSE)
    mine = [row for row in side.folder.rows if row["method"] == side.method and row["length"] == length]
    theirs = {row["task"] for row in side.folder.rows if row["method"] == DENSE and row["length"] == length}
    # beside dense only what both finished may be averaged
    places = [(row["task"], length) for row in mine if row["task"] in theirs or not theirs]
    value = average(side, places, key)
    found = faster(side, dense, places, key) if side.method != DENSE else None
    if value is None:
        failed = any(row["method"] == side.method and row["length"] == length for row in side.folder.failed)
        return Bar(side.method, look_of(side.method), None, "failed" if failed else "not run")
    return Bar(side.method, look_of(side.method), value, f"{found.times:.1f}x" if found else "")


def _stem(folder: Folder) -> str:
    return _safe(folder.name)


def _safe(name: str) -> str:
    """A name that any file system takes."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", name).strip("._") or "_"
