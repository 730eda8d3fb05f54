"""What the rows say of one method beside another: differences of scores, how many times as fast, share of the bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from saccade.evaluate.metrics import wilson
from saccade.evaluate.report.compare import FEW, Difference, paired, ratio, unpaired
from saccade.evaluate.report.folder import Folder

Place = tuple[str, int]  # task, length


class Side(NamedTuple):
    """A method of a folder."""

    folder: Folder
    method: str

    def row(self, place: Place) -> dict[str, Any] | None:
        """The finished row of a task and length."""
        return self.folder.by_cell.get((self.method, *place))

    def lines(self, place: Place) -> list[dict[str, Any]]:
        """The samples of a task and length."""
        return self.folder.samples.get((self.method, *place), [])


@dataclass(frozen=True)
class Faster:
    """How many times as fast, geometric mean; low and high are its 95 % interval where samples were timed."""

    times: float
    low: float | None = None
    high: float | None = None

    @property
    def sure(self) -> bool:
        """Is it known to be faster or slower?"""
        return self.low is not None and self.high is not None and (self.low > 1 or self.high < 1)


def shared(ours: Side, theirs: Side) -> list[Place]:
    """Tasks and lengths that both finished, measured in the same unit."""
    found = []
    for row in ours.folder.rows:
        if row["method"] == ours.method:
            other = theirs.row((row["task"], row["length"]))
            if other is not None and other.get("unit") == row.get("unit"):
                found.append((row["task"], row["length"]))
    return found


def is_share(row: dict[str, Any]) -> bool:
    """Is the score between 0 and 1, higher is better?"""
    return row.get("unit") is None and 0 <= row["score"] <= 1


def lower_is_better(row: dict[str, Any]) -> bool:
    """Says the row's unit so?"""
    return "lower is better" in str(row.get("unit"))


def mean_of(side: Side, places: Sequence[Place]) -> tuple[float, float | None, float | None, int]:
    """Mean score over samples, Wilson's ends, and the number of samples."""
    rows = [row for place in places if (row := side.row(place)) is not None]
    counts = [row["n"] or 0 for row in rows]
    n = sum(counts)
    if not all(counts):
        return math.fsum(row["score"] for row in rows) / len(rows), None, None, n
    hits = math.fsum(row["score"] * count for row, count in zip(rows, counts, strict=True))
    return hits / n, *wilson(min(hits, n), int(n)), int(n)


def difference(ours: Side, theirs: Side, places: Sequence[Place]) -> Difference | None:
    """The difference of scores over some tasks and lengths; on the same samples if all of them match."""
    if not places:
        return None
    if all(same_samples(ours, theirs, place) for place in places):
        scores = [[line["score"] for place in places for line in side.lines(place)] for side in (ours, theirs)]
        return paired(*scores)
    if len(places) == 1:
        a, b = (side.row(places[0]) for side in (ours, theirs))
        assert a is not None and b is not None
        ends = [(row["score"], row["low"], row["high"]) for row in (a, b)]
        return unpaired(*ends, n=min(a["n"] or 0, b["n"] or 0))
    a_mean, b_mean = mean_of(ours, places), mean_of(theirs, places)
    return unpaired(a_mean[:3], b_mean[:3], min(a_mean[3], b_mean[3]))


def same_samples(ours: Side, theirs: Side, place: Place) -> bool:
    """Did both answer the very same prompts, each of them?"""
    a, b = ours.lines(place), theirs.lines(place)
    rows = ours.row(place), theirs.row(place)
    if not a or not b or any(row is None or row["n"] != len(lines) for row, lines in zip(rows, (a, b), strict=True)):
        return False
    keys = [[(line["index"], line.get("prompt")) for line in lines] for lines in (a, b)]
    known = all(prompt is not None for side in keys for _, prompt in side)
    return keys[0] == keys[1] and (known or _same_source(ours.folder, theirs.folder))


def faster(ours: Side, theirs: Side, places: Sequence[Place], key: str = "ttft_s") -> Faster | None:
    """How many times as fast as the other: of paired samples where they were timed, else of the medians of cells."""
    pairs, cells, timed = [], [], True
    for place in places:
        a, b = ours.row(place), theirs.row(place)
        if a is None or b is None or not a[key] or not b[key]:
            continue
        cells.append((b[key], a[key]))
        lines = list(zip(theirs.lines(place), ours.lines(place), strict=False))
        both = [(slow.get(key), fast.get(key)) for slow, fast in lines]
        timed = timed and same_samples(ours, theirs, place) and all(x and y for x, y in both)
        pairs += both
    if not cells:
        return None
    if timed and len(pairs) >= FEW:
        return Faster(*ratio([slow for slow, _ in pairs], [fast for _, fast in pairs]))
    return Faster(math.exp(math.fsum(math.log(slow / fast) for slow, fast in cells) / len(cells)))


def share_of(ours: Side, theirs: Side, places: Sequence[Place], key: str = "kv_bytes") -> float | None:
    """Ours as a share of theirs, over the sum of cells."""
    rows = [(ours.row(place), theirs.row(place)) for place in places]
    both = [(a[key], b[key]) for a, b in rows if a and b and a[key] and b[key]]
    return sum(a for a, _ in both) / sum(b for _, b in both) if both else None


def average(side: Side, places: Sequence[Place], key: str) -> float | None:
    """Mean of a column over some cells."""
    values = [row[key] for place in places if (row := side.row(place)) is not None and row[key] is not None]
    return math.fsum(values) / len(values) if values else None


def _same_source(a: Folder, b: Folder) -> bool:
    return all(a.config.get(key) == b.config.get(key) for key in ("model", "seed"))
