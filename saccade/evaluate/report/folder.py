"""Reads what `saccade eval` left in a folder: rows, samples, maps of heads; says what is missing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from saccade.core.errors import FileError
from saccade.evaluate import samples

Cell = tuple[str, str, int]  # method, task, length
NUMBERS = ("n", "score", "low", "high", "density", "mass", "ttft_s", "tpot_s", "kv_bytes")
ASKED = ("model", "methods", "tasks", "lengths", "samples", "seed", "dtype", "device")


@dataclass(frozen=True)
class Folder:
    """One evaluation.

    Args:
        name: what it is called on the page; the last parts of its path.
        path: where it is.
        config: what was asked for.
        rows: finished cells in the order they were asked for.
        failed: cells that ended with an error, or without a score.
        missing: cells without any row.
        samples: per finished cell, a line for each sample; empty where there is no samples.jsonl.
        heads: lines of heads.jsonl, where there is one.
        conditions: machine, software and command of each time that cells were run.
        warnings: what is odd about the files.
    """

    name: str
    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    missing: list[Cell]
    samples: dict[Cell, list[dict[str, Any]]]
    heads: list[dict[str, Any]]
    conditions: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def by_cell(self) -> dict[Cell, dict[str, Any]]:
        """Finished rows by their cell."""
        return {cell_of(row): row for row in self.rows}

    @property
    def methods(self) -> list[str]:
        """Methods with a row, in the order they were asked for."""
        return list(dict.fromkeys(row["method"] for row in (*self.rows, *self.failed)))

    @property
    def lengths(self) -> list[int]:
        """Lengths with a finished row, short ones first."""
        return sorted({row["length"] for row in self.rows})

    def files(self) -> list[Path]:
        """The raw files that are there."""
        known = ("rows.jsonl", "config.json", samples.FILE, samples.PACKED, "heads.jsonl", samples.CONDITIONS)
        return [self.path / name for name in known if (self.path / name).is_file()]


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell of a row."""
    return row["method"], row["task"], row["length"]


def read_folders(paths: Sequence[str | os.PathLike[str]]) -> list[Folder]:
    """Read evaluations and give each a name of its own.

    Raises:
        FileError: not the folder of an evaluation, no rows, or rows that cannot be read.
    """
    seen: dict[Path, None] = dict.fromkeys(Path(path).resolve() for path in paths)
    return [read_folder(path, name) for path, name in zip(seen, _names(list(seen)), strict=True)]


def read_folder(path: Path, name: str = "") -> Folder:
    """Read one evaluation."""
    if not path.is_dir():
        raise FileError(f"{path}: no such folder; give a folder that `saccade eval --out` wrote")
    for wanted in ("config.json", "rows.jsonl"):
        if not (path / wanted).is_file():
            raise FileError(f"{path}: not the folder of an evaluation, it has no {wanted}; `saccade eval` writes one")
    config = _config(path / "config.json")
    asked = list(_cells(config))
    found: dict[Cell, dict[str, Any]] = {}
    warnings = []
    text = (path / "rows.jsonl").read_bytes().decode("utf-8", errors="replace")
    for number, line, whole in _lines(text):
        row = _row(line)
        if row is not None:
            # a cell that was done again has two rows: the later one counts
            found[cell_of(row)] = row
        elif whole:
            raise FileError(f"{path / 'rows.jsonl'}: line {number} is not a row of an evaluation")
        else:
            warnings.append(f"{name or path.name}: the last line of rows.jsonl is cut off and was left out.")
    if not found:
        raise FileError(f"{path / 'rows.jsonl'}: no rows yet; the `saccade eval` that writes them has not finished any")
    order = {cell: at for at, cell in enumerate(asked)}
    rows = sorted(found.values(), key=lambda row: order.get(cell_of(row), len(order)))
    good = [row for row in rows if not row.get("error") and row.get("score") is not None]
    cells = {cell_of(row) for row in good}
    return Folder(
        name=name or path.name,
        path=path,
        config=config,
        rows=good,
        failed=[row for row in rows if cell_of(row) not in cells],
        missing=[cell for cell in asked if cell not in found],
        samples={cell: lines for cell, lines in samples.read(path).items() if cell in cells},
        heads=_heads(path / "heads.jsonl"),
        conditions=_conditions(path / samples.CONDITIONS),
        warnings=warnings,
    )


TIMED = ("ttft_s", "tpot_s", "waterfall", "peak_bytes")


def with_times(folder: Folder, timed: Folder) -> Folder:
    """The same evaluation with times of another one in rows that have none: scores of many workers, times of one.

    Raises:
        FileError: the other one is of another model, number format or kind of device.
    """
    for key in ("model", "dtype", "device"):
        ours, theirs = (str(f.config.get(key)).split(":")[0] for f in (folder, timed))
        if ours != theirs:
            raise FileError(f"{timed.path}: its times are of {key} {theirs}, {folder.path} is of {ours}; give another")
    rows = []
    for row in folder.rows:
        other = timed.by_cell.get(cell_of(row))
        gaps = {} if other is None else {key: other.get(key) for key in TIMED if row.get(key) is None}
        rows.append(row | gaps)
    return replace(folder, rows=rows, conditions=[*folder.conditions, *timed.conditions])


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path}: not readable as JSON ({error})") from None
    lists = ("methods", "tasks", "lengths")
    if not isinstance(config, dict) or not all(isinstance(config.get(key), list) for key in lists):
        raise FileError(f"{path}: not the config of an evaluation, it needs lists of {', '.join(lists)}")
    return config


def _cells(config: dict[str, Any]) -> Iterator[Cell]:
    for length in config["lengths"]:
        for task in config["tasks"]:
            for method in config["methods"]:
                yield method, task, length


def _lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """(number, line, it ends with a newline) of lines that are not empty."""
    lines = text.split("\n")
    for at, line in enumerate(lines):
        if line.strip():
            yield at + 1, line, at < len(lines) - 1


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    named = all(isinstance(row.get(key), kind) for key, kind in (("method", str), ("task", str), ("length", int)))
    numeric = all(row.get(key) is None or _is_number(row[key]) for key in NUMBERS)
    if not named or not numeric:
        return None
    return dict.fromkeys(NUMBERS) | row


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _conditions(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    found = []
    for _, line, _ in _lines(path.read_text(encoding="utf-8", errors="replace")):
        try:
            held = json.loads(line)
        except ValueError:
            continue
        if isinstance(held, dict):
            found.append({str(key): str(value) for key, value in held.items()})
    return found


def _heads(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line, whole in _lines(path.read_text(encoding="utf-8", errors="replace")):
        try:
            row = json.loads(line)
            key = (row["method"], row["task"], row["length"], row["phase"])
            if not all(_is_grid(row.get(what)) for what in ("density", "mass")):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            if whole:
                raise FileError(f"{path}: line {number} is not a map of heads") from None
            continue
        found[key] = row
    return list(found.values())


def _is_grid(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(row, list) and 0 < len(row) == len(value[0]) for row in value)
        and all(cell is None or _is_number(cell) for row in value for cell in row)
    )


def _names(paths: list[Path]) -> list[str]:
    """The fewest last parts of each path that tell them apart."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
