"""What each single sample scored, in `samples.jsonl` beside the rows: for heat maps, and for tests on the same samples.

A cell's lines are written before its row, and again when the cell is done again: of lines for the same sample the last
one counts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.core.errors import FileError

if TYPE_CHECKING:
    from saccade.evaluate.generate import Answer
    from saccade.evaluate.tasks.base import Sample

FILE = "samples.jsonl"
PACKED = f"{FILE}.gz"  # the same, as `gzip` leaves it, of an evaluation that is kept and not continued
CONDITIONS = "conditions.jsonl"  # a line for each time that cells were run: machine, software, command
Cell = tuple[str, str, int]  # method, task, length


def lines_of(
    cell: Cell, samples: Sequence[Sample], said: Sequence[Answer], scores: Sequence[float]
) -> list[dict[str, Any]]:
    """A line per sample: the cell, index, digest of the prompt, depth, score, and times where it was read alone."""
    method, task, length = cell
    return [
        {
            "method": method,
            "task": task,
            "length": length,
            "index": index,
            "prompt": digest(sample.ids),
            "depth": sample.depth,
            "score": float(score),
            "ttft_s": None if one.ttft_s is None else round(one.ttft_s, 5),
            "tpot_s": None if one.tpot_s is None else round(one.tpot_s, 6),
        }
        for index, (sample, one, score) in enumerate(zip(samples, said, scores, strict=True))
    ]


def digest(ids: Sequence[int]) -> str:
    """Twelve letters that tell prompts apart.

    Example:
        >>> digest([1, 2, 3]) == digest([1, 2, 3]), digest([1, 23]) == digest([12, 3])
        (True, False)
    """
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:12]


def append(folder: Path, lines: Sequence[dict[str, Any]], file: str = FILE) -> None:
    """Add lines at the end of a file of the folder, in one write; on a new line even where a crash cut the last one."""
    path = folder / file
    if not lines:
        return
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, b"\n" + text if cut else text)
    finally:
        os.close(handle)


def read(folder: Path) -> dict[Cell, list[dict[str, Any]]]:
    """The lines of each cell in the order of their index; nothing where there is no file.

    Lines that a crash cut are left out.

    Raises:
        FileError: the file holds something else than lines of samples.
    """
    path = folder / FILE
    packed = folder / PACKED
    found: dict[Cell, dict[int, dict[str, Any]]] = {}
    if path.exists():
        whole = path.read_bytes()
    elif packed.exists():
        try:
            whole = gzip.decompress(packed.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise FileError(f"{packed}: not readable as gzip ({error})") from None
    else:
        return {}
    for at, text in enumerate(whole.decode("utf-8", errors="replace").split("\n")):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not _is_sample(line):
            raise FileError(f"{path}: line {at + 1} is not a sample of an evaluation")
        found.setdefault((line["method"], line["task"], line["length"]), {})[line["index"]] = line
    return {cell: [by_index[index] for index in sorted(by_index)] for cell, by_index in found.items()}


def _is_sample(line: Any) -> bool:
    if not isinstance(line, dict):
        return False
    wanted = {"method": str, "task": str, "length": int, "index": int, "score": (int, float)}
    depth = line.get("depth")
    return all(isinstance(line.get(key), kind) for key, kind in wanted.items()) and (
        depth is None or (isinstance(depth, (int, float)) and 0 <= depth <= 1)
    )
