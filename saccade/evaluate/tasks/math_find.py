"""Math-find: a long list of integers; the question at the end asks for its largest, third smallest, median, ..."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, first_number, pack, source

KINDS = ("largest", "second-largest", "third-largest", "smallest", "second-smallest", "third-smallest", "median")


@dataclass(frozen=True)
class MathFind(Worded):
    """A list of integers within 0..99 that fills the length, and a question about all of it.

    Math.Find of InfiniteBench (Zhang et al. 2024, arXiv 2402.13718, code: OpenBMB/InfiniteBench). The ends of the range
    are drawn first (0..19 and 79..99), so that the answer varies. Second and third are of distinct values; the median
    of an even count is the mean of the middle two. Score: 1 where the first number that is said is the answer.

    Args:
        kind: one of `KINDS` (None: in turn).
        max_new_tokens: tokens kept free for the answer.

    Example:
        >>> MathFind().score(" 87, the largest", Sample([], "87", 8))
        1.0
    """

    name: ClassVar[str] = "math-find"
    file: ClassVar[str] = __file__
    kind: str | None = None
    max_new_tokens: int = 8

    def __post_init__(self):
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"MathFind: unknown kind {self.kind!r}; known are {', '.join(KINDS)}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        kind = self.kind or KINDS[index % len(KINDS)]
        low, high = rng.randint(0, 19), rng.randint(79, 99)
        numbers = [rng.randint(low, high) for _ in range(length)]
        if kind not in said["questions"]:
            raise InputError(f"wording of math-find: no question for {kind}")
        question = said["questions"][kind]

        def compose(size: int) -> str:
            return "[" + ", ".join(map(str, numbers[:size])) + "]\n\n" + question

        ids, size = pack(tokenizer, length - self.max_new_tokens, compose, 5, length, said["head"])
        return Sample(ids, find(numbers[:size], kind), self.max_new_tokens, None, question)

    def score(self, prediction: str, sample: Sample) -> float:
        found = first_number(prediction)
        return float(bool(found) and float(found) == float(sample.answer))


def find(numbers: Sequence[int], kind: str) -> str:
    """The answer of a kind of `KINDS`, as it is written.

    Example:
        >>> find([5, 9, 9, 2], "second-largest"), find([5, 9, 9, 2], "median"), find([5, 9, 2], "median")
        ('5', '7.0', '5')
    """
    if kind == "median":
        ordered, half = sorted(numbers), len(numbers) // 2
        return str(ordered[half]) if len(numbers) % 2 else str((ordered[half - 1] + ordered[half]) / 2)
    ordered = sorted(set(numbers), reverse=kind.endswith("largest"))
    place = 1 if kind.startswith("second") else 2 if kind.startswith("third") else 0
    if place >= len(ordered):
        raise InputError(f"math-find: {len(ordered)} different numbers have no {kind}; ask for a longer text")
    return str(ordered[place])
