"""Variable tracking: a name is set to a value, others to that name, and so on; which names come to the value?"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_uppercase
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, check_counts, contained, pack, say, source
from saccade.evaluate.tasks.haystack import Haystack, books, noise

# dull lines around the chain of the worked example
SHOT_LINES = 6


@dataclass(frozen=True)
class VariableTracking(Worded):
    """Chains of assignments scattered in order over a haystack; all names of the first one are asked for.

    RULER (Hsieh et al. 2024, arXiv 2404.06654, code: NVIDIA/RULER). Names are five capitals, values five digits. Score:
    the share of the names that stand anywhere in the answer. Departs from RULER: names of a sample never repeat, those
    of the worked example included.

    Args:
        hops: names after the first of a chain.
        chains: chains; all but the first only distract.
        haystack: "noise" (dull lines) or "books".
        shots: worked examples in front.
        max_new_tokens: tokens kept free for the answer.
    """

    name: ClassVar[str] = "variable-tracking"
    file: ClassVar[str] = __file__
    hops: int = 4
    chains: int = 1
    haystack: str = "noise"
    shots: int = 1
    max_new_tokens: int = 48

    def __post_init__(self):
        check_counts("VariableTracking", hops=self.hops, chains=self.chains)
        if self.haystack not in ("noise", "books"):
            raise InputError(f"VariableTracking: unknown haystack {self.haystack!r}; known are noise, books")
        if self.shots < 0:
            raise InputError(f"VariableTracking: shots must be at least 0, got {self.shots}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        sets = self.chains + self.shots
        names = draw_variables(rng, sets * (self.hops + 1))
        rows = [names[i * (self.hops + 1) : (i + 1) * (self.hops + 1)] for i in range(sets)]
        values = [str(value) for value in rng.sample(range(10_000, 99_999), sets)]
        head = said["head"]
        for row, value in zip(rows[self.chains :], values[self.chains :], strict=True):
            lines, places = self._scattered(rng, [row], [value])
            dull = noise(said["noise"], SHOT_LINES).body(SHOT_LINES, lines, places)
            head += f"{dull}\n\n{say(said['question'], value=value)} {', '.join(row)}\n\n"
        lines, places = self._scattered(rng, rows[: self.chains], values)
        question = say(said["question"], value=values[0])
        hay: Haystack = books(rng, length) if self.haystack == "books" else noise(said["noise"], length)

        def compose(size: int) -> str:
            return hay.body(size, lines, places) + "\n\n" + question

        ids, _ = pack(tokenizer, length - self.max_new_tokens, compose, hay.least, hay.most, head, slack=4)
        return Sample(ids, ", ".join(rows[0]), self.max_new_tokens, places[0], question, tuple(rows[0]))

    def score(self, prediction: str, sample: Sample) -> float:
        return contained(prediction, sample.answers)

    def _scattered(self, rng: Random, rows: list[list[str]], values: list[str]) -> tuple[list[str], list[float]]:
        """Statements of each chain at places in their order."""
        lines, places = [], []
        for row, value in zip(rows, values, strict=False):
            for name, given in zip(row, [value, *row], strict=False):
                lines.append(say(self.said["statement"], name=name, given=given))
            places += sorted(rng.random() for _ in row)
        return lines, places


def draw_variables(rng: Random, count: int) -> list[str]:
    """Different names of five capitals."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(ascii_uppercase, k=5))] = None
    return list(names)
