"""Tables of rows that a small script sorts and filters; without it they are plain tables."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

from saccade.evaluate.presets import DENSE
from saccade.evaluate.report.compare import Difference
from saccade.evaluate.report.facts import Faster, Side, difference, faster, is_share, lower_is_better, share_of
from saccade.evaluate.report.folder import Folder, cell_of
from saccade.evaluate.report.words import chance, percent, seconds, signed, size, span, tokens


class Cell(NamedTuple):
    """What a cell shows, what it is sorted by (None: last, whatever the direction), small words below, and a class."""

    text: str
    key: float | str | None = None
    small: str = ""
    kind: str = ""


NONE = Cell("-")


def sheet(name: str, caption: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]], words: int = 1) -> str:
    """A table with a filter above it and a button in each head.

    Args:
        name: of the table, for ids.
        caption: what it holds.
        heads: names of the columns.
        rows: its cells.
        words: columns at the left that hold words; the others are aligned to the right.
    """
    head = "".join(
        f'<th scope="col" class="{"l" if at < words else "r"}" aria-sort="none"><button type="button">'
        f'{html.escape(text)}<span aria-hidden="true"></span></button></th>'
        for at, text in enumerate(heads)
    )
    body = "\n".join("<tr>" + "".join(_cell(cell, at, words) for at, cell in enumerate(row)) + "</tr>" for row in rows)
    caption = html.escape(caption)
    return (
        f'<div class="filter"><label for="{name}-filter">Filter rows</label>'
        f'<input id="{name}-filter" type="search" placeholder="method, task, length" autocomplete="off" '
        f'aria-controls="{name}"><output for="{name}-filter">{len(rows)} rows</output></div>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f'<table class="sheet" id="{name}"><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def rows_table(folders: Sequence[Folder]) -> str:
    """Every cell of every folder, failed ones too."""
    many = len(folders) > 1
    heads = ["Method", "Task", "Tokens", "Samples", "Score", "Against dense", "First token", "Per token"]
    heads += ["Keys and values", "Pairs read", "Weight kept"]
    cells = [[*([Cell(folder.name, folder.name)] if many else []), *row] for folder in folders for row in _rows(folder)]
    caption = "All cells with 95 % intervals; small: the interval, the test, times as fast as dense"
    if many:
        # the method stays first, because the first column stays in sight
        heads.insert(1, "Run")
        cells = [[row[1], row[0], *row[2:]] for row in cells]
    return sheet("rows", caption, heads, cells, 3 if many else 2)


def compare_table(folders: Sequence[Folder]) -> str:
    """The same cell of several folders side by side, the others tested against the first."""
    first = folders[0]
    cells = list(dict.fromkeys(cell_of(row) for folder in folders for row in (*folder.rows, *folder.failed)))
    heads = ["Method", "Task", "Tokens"]
    for folder in folders:
        heads += [f"Score, {folder.name}"]
        heads += [f"Against {first.name}"] if folder is not first else []
    heads += [f"First token, {folder.name}" for folder in folders]
    rows = []
    for method, task, length in cells:
        place, side = (task, length), Side(first, method)
        row = [Cell(method, method), Cell(task, task), Cell(tokens(length), length)]
        for folder in folders:
            mine = Side(folder, method)
            found = mine.row(place)
            row.append(_failed(folder, (method, task, length)) if found is None else _score(found))
            if folder is not first:
                theirs = side.row(place)
                both = found is not None and theirs is not None and found.get("unit") == theirs.get("unit")
                one = difference(mine, side, [place]) if both else None
                row.append(NONE if found is None else _delta(one, found))
        for folder in folders:
            found = Side(folder, method).row(place)
            value = None if found is None else found["ttft_s"]
            row.append(Cell(seconds(value), value))
        rows.append(row)
    return sheet("runs", f"Runs side by side, differences from {first.name}", heads, rows, 2)


def _rows(folder: Folder) -> list[list[Cell]]:
    asked = {
        (method, task, length): at
        for at, (length, task, method) in enumerate(
            (length, task, method)
            for length in folder.config["lengths"]
            for task in folder.config["tasks"]
            for method in folder.config["methods"]
        )
    }
    rows = sorted((*folder.rows, *folder.failed), key=lambda row: asked.get(cell_of(row), len(asked)))
    missing = [
        dict.fromkeys(("n", "score"), None) | dict(zip(("method", "task", "length"), c, strict=True))
        for c in folder.missing
    ]
    return [_row(folder, row) for row in (*rows, *missing)]


def _row(folder: Folder, row: dict[str, Any]) -> list[Cell]:
    method, task, length = cell_of(row)
    head = [Cell(method, method), Cell(task, task), Cell(tokens(length), length)]
    if (method, task, length) not in folder.by_cell:
        return [*head, NONE, _failed(folder, (method, task, length)), *[NONE] * 6]
    side, dense, place = Side(folder, method), Side(folder, DENSE), (task, length)
    theirs = dense.row(place)
    beside = method != DENSE and theirs is not None and theirs.get("unit") == row.get("unit")
    found = difference(side, dense, [place]) if beside else None
    first, step = (faster(side, dense, [place], key) if beside else None for key in ("ttft_s", "tpot_s"))
    kept = share_of(side, dense, [place]) if beside else None
    return [
        *head,
        Cell("-" if row["n"] is None else f"{row['n']:g}", row["n"]),
        _score(row),
        _delta(found, row),
        Cell(seconds(row["ttft_s"]), row["ttft_s"], _times(first)),
        Cell(seconds(row["tpot_s"]), row["tpot_s"], _times(step)),
        Cell(size(row["kv_bytes"]), row["kv_bytes"], "" if kept is None else f"{percent(kept)} of dense"),
        Cell(percent(row["density"]), row["density"]),
        Cell(percent(row["mass"]), row["mass"]),
    ]


def _score(row: dict[str, Any]) -> Cell:
    form = "{:.2f}" if is_share(row) else "{:.4g}"
    small = "" if row["low"] is None else f"{form.format(row['low'])} to {form.format(row['high'])}"
    if row.get("unit") is not None:
        small = f"{small}; {row['unit']}" if small else str(row["unit"])
    turns = row.get("turns")
    if isinstance(turns, list) and all(isinstance(turn, (int, float)) for turn in turns):
        small += f"; by turn {', '.join(f'{turn:.2f}' for turn in turns)}"
    return Cell(form.format(row["score"]), row["score"], small)


def _delta(found: Difference | None, row: dict[str, Any]) -> Cell:
    if found is None:
        return NONE
    better = found.delta < 0 if lower_is_better(row) else found.delta > 0
    kind = ("good" if better else "bad") if found.sure else ""
    doubt = ""
    if found.low is not None and found.high is not None and not found.sure:
        doubt = "within the interval; " if found.low <= 0 <= found.high else "too few for the test; "
    test = found.how if found.p is None else f"{found.how}, {chance(found.p)}"
    return Cell(signed(found.delta), found.delta, f"{span(found.low, found.high)}; {doubt}{test}", kind)


def _failed(folder: Folder, cell: tuple[str, str, int]) -> Cell:
    for row in folder.failed:
        if cell_of(row) == cell:
            return Cell("failed", None, str(row.get("error") or "no score was recorded"), "bad")
    return Cell("not run", None, "asked for, no row yet" if cell in folder.missing else "not asked for")


def _times(found: Faster | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{found.times:.2f}x"
    return f"{found.times:.2f}x, {found.low:.2f} to {found.high:.2f}"


def _cell(cell: Cell, at: int, words: int) -> str:
    tag = 'th scope="row"' if at == 0 else "td"
    key = "" if cell.key is None else f' data-key="{html.escape(str(cell.key), quote=True)}"'
    kinds = " ".join(filter(None, ["l" if at < words else "r", cell.kind]))
    small = f"<small>{html.escape(cell.small)}</small>" if cell.small else ""
    return f'<{tag} class="{kinds}"{key}>{html.escape(cell.text)}{small}</{tag.split()[0]}>'
