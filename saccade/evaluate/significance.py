"""Is a method better or worse than dense attention? Told from the same samples, with the sign of the task's unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from saccade.evaluate.report.compare import Difference, paired
from saccade.evaluate.samples import Cell

BETTER, WORSE, EVEN, SAME = "better", "worse", "even", "same"


class Verdict(NamedTuple):
    """What the samples say.

    Args:
        word: "better" or "worse" where the 95 % interval of the difference leaves out 0 and p is below 0.05; "same"
            where no sample differs; else "even", which says only that these samples do not tell.
        found: the difference of the means, its interval, p, and which test.
    """

    word: str
    found: Difference


def verdict(ours: Sequence[float], theirs: Sequence[float], *, lower: bool = False) -> Verdict:
    """Two methods on the same samples: McNemar's exact test for scores of 0 and 1, a paired bootstrap for others.

    Args:
        ours, theirs: scores, sample by sample.
        lower: is lower better?

    Example:
        >>> verdict([0.0] * 7, [1.0] * 7).word, verdict([0.0] * 7, [1.0] * 7, lower=True).word
        ('worse', 'better')
        >>> verdict([1.0, 0.0], [0.0, 0.0]).word
        'even'
    """
    found = paired(ours, theirs)
    if list(ours) == list(theirs):
        return Verdict(SAME, found)
    if not found.sure:
        return Verdict(EVEN, found)
    return Verdict(BETTER if (found.delta > 0) != lower else WORSE, found)


def against(
    rows: Sequence[dict[str, Any]], samples: dict[Cell, list[dict[str, Any]]], other: str = "dense"
) -> dict[Cell, Verdict]:
    """A verdict on every finished cell that another method has too, on the very same prompts.

    Args:
        rows: of an evaluation.
        samples: their lines, from `saccade.evaluate.samples.read`.
        other: the method that all others are compared with.
    """
    found = {}
    for row in rows:
        cell = row["method"], row["task"], row["length"]
        ours, theirs = samples.get(cell, []), samples.get((other, *cell[1:]), [])
        prompts = [[(line["index"], line.get("prompt")) for line in side] for side in (ours, theirs)]
        if row["method"] != other and not row.get("error") and ours and prompts[0] == prompts[1]:
            scores = [[line["score"] for line in side] for side in (ours, theirs)]
            found[cell] = verdict(*scores, lower="lower is better" in str(row.get("unit")))
    return found
