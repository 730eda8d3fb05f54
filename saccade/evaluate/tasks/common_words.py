"""Common words: a numbered list of words, ten of which come more often than the others; which ten?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, check_counts, contained, pack, say, source
from saccade.reader.words import words

# below so many tokens the counts are a fifth, as in RULER
SHORT = 4096


@dataclass(frozen=True)
class CommonWords(Worded):
    """A list in which `common` words come `often` times and all others `seldom` times.

    RULER's common words extraction (Hsieh et al. 2024, arXiv 2404.06654, code: NVIDIA/RULER). The number of other words
    is what fits; no word is cut off the list. Score: the share of the common words that stand anywhere in the answer.
    Nearly every position counts, so a method that reads few of them must lose here.

    Args:
        common: words to be found.
        often, seldom: how often the common ones and the others come (None: 30 and 3, below 4096 tokens 6 and 1).
        shots: worked examples in front, with 20 (short ones) or 40 different words.
        max_new_tokens: tokens kept free for the answer.
    """

    name: ClassVar[str] = "common-words"
    file: ClassVar[str] = __file__
    common: int = 10
    often: int | None = None
    seldom: int | None = None
    shots: int = 1
    max_new_tokens: int = 120

    def __post_init__(self):
        check_counts("CommonWords", common=self.common)
        often, seldom = self.counts(SHORT)
        if not 1 <= seldom < often or self.shots < 0:
            raise InputError(f"CommonWords: needs often {often} > seldom {seldom} >= 1 and shots {self.shots} >= 0")

    def counts(self, length: int) -> tuple[int, int]:
        """How often the common words and the others come in so many tokens."""
        often, seldom = (6, 1) if length < SHORT else (30, 3)
        return (often if self.often is None else self.often), (seldom if self.seldom is None else self.seldom)

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        # test words first; where they do not suffice, those that the reader was trained on
        known = [*words("test").nouns, *words("test").adjectives]
        if length > 16 * len(known):
            known += [*words("train").nouns, *words("train").adjectives]
        known = list(dict.fromkeys(known))
        rng.shuffle(known)
        question = say(said["question"], count=self.common)
        head, short = said["head"], length < SHORT
        for _ in range(self.shots):
            size = self.common + (10 if short else 30)
            shown, known = known[:size], known[size:]
            listed = numbered(counted(shown, self.common, 3 if short else 10, 1 if short else 3, rng.random()))
            head += f"{listed}\n\n{question} {numbered(shown[: self.common])}\n\n"
        often, seldom = self.counts(length)
        order = rng.random()

        def compose(size: int) -> str:
            return numbered(counted(known[:size], self.common, often, seldom, order)) + "\n\n" + question

        most = min(len(known), self.common + length)
        ids, _ = pack(tokenizer, length - self.max_new_tokens, compose, self.common + 1, most, head)
        answers = tuple(known[: self.common])
        return Sample(ids, numbered(answers), self.max_new_tokens, None, question, answers)

    def score(self, prediction: str, sample: Sample) -> float:
        return contained(prediction, sample.answers)


def counted(names: Sequence[str], common: int, often: int, seldom: int, order: float) -> list[str]:
    """Each of the first `common` names `often` times, the others `seldom` times, shuffled by `order`."""
    every = [name for name in names[:common] for _ in range(often)]
    every += [name for name in names[common:] for _ in range(seldom)]
    Random(f"{order}/{len(every)}").shuffle(every)
    return every


def numbered(names: Sequence[str]) -> str:
    """Names as a numbered list on one line.

    Example:
        >>> numbered(["oak", "elm"])
        '1. oak 2. elm'
    """
    return " ".join(f"{i}. {name}" for i, name in enumerate(names, 1))
