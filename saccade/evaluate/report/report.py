"""The report of evaluations: one HTML file with everything inside, and its pictures as files beside it."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from saccade.core.errors import UnsupportedError
from saccade.core.files import write_whole
from saccade.evaluate.report.drawing import looks_css
from saccade.evaluate.report.folder import ASKED, Folder, read_folders, with_times
from saccade.evaluate.report.heat import CROSS, DASH
from saccade.evaluate.report.ideas import idea
from saccade.evaluate.report.nearness import nearness_table, pays_table
from saccade.evaluate.report.pictures import (
    Picture,
    bar_pictures,
    budget_pictures,
    head_pictures,
    heat_pictures,
    pareto_pictures,
    stack_pictures,
)
from saccade.evaluate.report.positions import positions_tables
from saccade.evaluate.report.runs import compared, mixed
from saccade.evaluate.report.summary import Summary, summarize
from saccade.evaluate.report.tables import compare_table, rows_table
from saccade.evaluate.report.template import fill, part
from saccade.evaluate.report.words import several, tokens


@dataclass(frozen=True)
class Written:
    """What a report said and where it is.

    Args:
        page: the HTML file.
        pictures: files beside it.
        summaries: by the name of a folder.
        compared: sentences on runs side by side.
        warnings: shown at the top of the page.
    """

    page: Path
    pictures: list[Path]
    summaries: dict[str, Summary]
    compared: list[str]
    warnings: list[str]

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "page": str(self.page),
            "pictures": [str(path) for path in self.pictures],
            "summary": {name: asdict(summary) for name, summary in self.summaries.items()},
            "compared": self.compared,
            "warnings": self.warnings,
        }


def write_report(
    page: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]],
    times: str | os.PathLike[str] | None = None,
) -> Written:
    """Read evaluations and write their report; files are whole or not there.

    Args:
        page: the HTML file; pictures go to a folder beside it that ends in "-plots".
        paths: folders that `saccade eval` wrote.
        times: folder of an evaluation whose times stand in for those that rows do not have.

    Raises:
        FileError: a folder that holds no evaluation, or rows that cannot be read; nothing is written then.
    """
    target = Path(page).resolve()
    folders = read_folders(paths)
    if times is not None:
        (timed,) = read_folders([times])
        folders = [with_times(folder, timed) for folder in folders]
    summaries = {folder.name: summarize(folder) for folder in folders}
    warnings = [*mixed(folders), *(line for folder in folders for line in folder.warnings)]
    said = compared(folders)
    groups = [(draw, [list(draw(folder)) for folder in folders]) for draw in DRAWN]
    text = _page(target, folders, summaries, said, warnings, [found for _, found in groups])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text)
    pictures = [picture for _, found in groups for each in found for picture in each]
    return Written(target, _save(target, pictures), summaries, said, warnings)


DRAWN = (pareto_pictures, budget_pictures, heat_pictures, head_pictures, bar_pictures, stack_pictures)


def _save(page: Path, pictures: Iterable[Picture]) -> list[Path]:
    """Write each picture as SVG, and as PNG where matplotlib is installed."""
    folder = page.with_name(f"{page.stem}-plots")
    found: list[Path] = []
    taken: set[str] = set()
    png = True
    for picture in pictures:
        folder.mkdir(exist_ok=True)
        # names that differ only in letters that files may not have
        stem = picture.stem if picture.stem not in taken else f"{picture.stem}-{len(taken)}"
        taken.add(stem)
        found.append(folder / f"{stem}.svg")
        write_whole(found[-1], picture.svg(alone=True))
        try:
            if png:
                picture.save_png(folder / f"{stem}.png")
                found.append(folder / f"{stem}.png")
        except UnsupportedError:
            png = False
    return found


def _page(
    target: Path,
    folders: Sequence[Folder],
    summaries: dict[str, Summary],
    said: Sequence[str],
    warnings: Sequence[str],
    groups: Sequence[Sequence[Sequence[Picture]]],
) -> str:
    score, budget, depth, heads, time, parts = (
        _section(*words, folders, found)
        for words, found in zip(
            (
                (
                    "What a score costs",
                    "Up and left is better. The line joins methods that none beats in both; grey: controls.",
                    "grid",
                ),
                ("What a budget buys", "A line for each method that was run with several budgets.", "grid"),
                (
                    "Where the fact stands",
                    f"The number is the mean score. {CROSS} failed, {DASH} nothing was run.",
                    "grid small",
                ),
                ("Layers and heads", "Each row is a layer, each column a head.", "pictures"),
                ("How long it takes", "Medians of cells, averaged over tasks; x: times as fast as dense.", "grid"),
                (
                    "Where the time goes",
                    "A run of its own with a clock in it, a little slower than the times above. Copying: keys and "
                    "values stored, gathered or moved; the rest: projections, feed-forward, what Python adds.",
                    "grid",
                ),
            ),
            groups,
            strict=True,
        )
    )
    return fill(
        "report.html",
        title=html.escape(f"What the shortcut costs: {several(list(dict.fromkeys(_model(f) for f in folders)))}"),
        looks=looks_css(),
        lead=html.escape(" ".join(_lead(folder, len(folders) > 1) for folder in folders)),
        warnings="".join(f'<p class="warn">{html.escape(line)}</p>' for line in warnings),
        summaries="\n".join(_summary(folder, summaries[folder.name], len(folders) > 1) for folder in folders),
        compared=_compared(folders, said),
        score=score,
        budget=budget,
        depth=depth,
        heads=heads,
        time=time,
        parts=parts,
        pays=pays_table(folders),
        nearness=nearness_table(folders),
        table=rows_table(folders),
        positions=positions_tables(folders),
        methods="\n".join(_method(name) for name in dict.fromkeys(name for f in folders for name in f.methods)),
        conditions="\n".join(_conditions(folder, target) for folder in folders),
        script=part("script.html").rstrip(),
    )


def _lead(folder: Folder, many: bool) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in (*folder.rows, *folder.failed)))
    lengths = [tokens(length) for length in folder.lengths]
    finished = len(folder.rows) + len(folder.failed) + len(folder.missing)
    name = f"{folder.name}: " if many else ""
    return (
        f"{name}{several(folder.methods)} on {several(tasks)} at {several(lengths or ['no'])} tokens, "
        f"{folder.config.get('samples', '?')} samples a cell, {len(folder.rows)} of {finished} cells finished."
    )


def _summary(folder: Folder, summary: Summary, many: bool) -> str:
    name = f"<h2>{html.escape(folder.name)}</h2>" if many else "<h2>Summary</h2>"
    parts = (("What you gain", summary.gain), ("What you lose", summary.lose), ("What limits", summary.limits))
    lists = "".join(f"<div><h3>{head}</h3>{_list(lines)}</div>" for head, lines in parts)
    return f'<section class="summary">{name}<div class="three">{lists}</div></section>'


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_sentence(line)}</li>' for line in lines)}</ul>"


def _sentence(line: str) -> str:
    """What stands in brackets with an interval is set small: it is to be found, not to be read first."""
    return re.sub(r"\([^()]*(?:95 % \S|samples)[^()]*\)", r"<span>\g<0></span>", html.escape(line))


def _compared(folders: Sequence[Folder], said: Sequence[str]) -> str:
    if len(folders) == 1:
        return ""
    return f"<h2>Runs side by side</h2>{_list(said)}{compare_table(folders)}"


def _section(title: str, how: str, kind: str, folders: Sequence[Folder], found: Sequence[Sequence[Picture]]) -> str:
    if not any(found):
        return ""
    parts = [f"<h2>{title}</h2><p>{how}</p>"]
    for folder, pictures in zip(folders, found, strict=True):
        if len(folders) > 1 and pictures:
            parts.append(f"<h3>{html.escape(folder.name)}</h3>")
        # the first group stands open: the longest length, the first task
        for at, (name, group) in enumerate(groupby(pictures, key=lambda picture: picture.group)):
            grid = f'<div class="{kind}">{"".join(_figure(picture) for picture in group)}</div>'
            head = f"<details{'' if at else ' open'}><summary>{html.escape(name)}</summary>"
            parts.append(f"{head}{grid}</details>")
    return "\n".join(parts)


def _figure(picture: Picture) -> str:
    caption = f"<figcaption>{html.escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f"<figure>{picture.svg()}{caption}</figure>"


def _method(name: str) -> str:
    return f"<dt>{html.escape(name)}</dt><dd>{html.escape(idea(name))}</dd>"


def _conditions(folder: Folder, target: Path) -> str:
    rows = [(key, folder.config[key]) for key in ASKED if key in folder.config]
    rows += [(key, value) for key, value in folder.config.items() if key not in ASKED and value]
    for number, held in enumerate(folder.conditions, 1):
        name = f"run {number}" if len(folder.conditions) > 1 else "run"
        rows.append((name, "; ".join(held.values())))
    lines = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(_plain(value))}</dd>" for key, value in rows)
    links = ", ".join(
        f'<a href="{html.escape(quote(os.path.relpath(file, target.parent)), quote=True)}">{html.escape(file.name)}</a>'
        for file in folder.files()
    )
    return f"<h3>{html.escape(folder.name)}</h3><dl>{lines}<dt>files</dt><dd>{links}</dd></dl>"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "; ".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def _model(folder: Folder) -> str:
    return str(folder.config.get("model", "a model"))
