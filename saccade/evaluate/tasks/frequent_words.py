"""Frequent words: a text of made-up words whose frequencies fall off by a power law; which three lead?"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, contained, pack, source

BLANK = "..."
ASKED = 3
# words below which the fourth rank could come as often as the fifth
LEAST = 80
# tokens of the text per different word, as in RULER
PER_WORD = 50


@dataclass(frozen=True)
class FrequentWords(Worded):
    """Made-up words of six letters, the one of rank k int(n / (k^alpha zeta(alpha))) times; rank 1 is dots.

    RULER's frequent words extraction (Hsieh et al. 2024, arXiv 2404.06654, code: NVIDIA/RULER). Ranks 2, 3 and 4 are
    asked for. Score: the share of them that stands anywhere in the answer. A count needs every position a little: where
    a method keeps the k highest scores only, this is the task that shows it. Departs from RULER: n is the largest that
    fits, not a multiple of a thirty-second of the length.

    Args:
        alpha: of the power law, above 1.
        max_new_tokens: tokens kept free for the answer.
    """

    name: ClassVar[str] = "frequent-words"
    file: ClassVar[str] = __file__
    alpha: float = 2.0
    max_new_tokens: int = 50

    def __post_init__(self):
        if not self.alpha > 1:
            raise InputError(f"FrequentWords: alpha must be above 1, got {self.alpha}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        target = length - self.max_new_tokens
        names = coded(rng, max(target // PER_WORD, ASKED + 2))
        total, order = zeta(self.alpha), rng.random()
        shares = [rank**-self.alpha / total for rank in range(1, len(names) + 1)]

        def compose(size: int) -> str:
            text = [name for name, share in zip(names, shares, strict=True) for _ in range(int(size * share))]
            Random(f"{order}/{size}").shuffle(text)
            return " ".join(text) + "\n\n" + said["question"]

        # dots are a token at most every word
        ids, size = pack(tokenizer, target, compose, LEAST, 2 * length + LEAST, said["head"], slack=4)
        counts = [int(size * share) for share in shares[: ASKED + 2]]
        if len(set(counts)) < len(counts):
            raise InputError(f"frequent-words: {length} tokens are too few to tell the ranks apart")
        answers = tuple(names[1 : 1 + ASKED])
        return Sample(ids, " ".join(answers), self.max_new_tokens, None, said["question"], answers)

    def score(self, prediction: str, sample: Sample) -> float:
        return contained(prediction, sample.answers)


def coded(rng: Random, count: int) -> list[str]:
    """Dots, and `count - 1` different words of six random letters."""
    names: dict[str, None] = {BLANK: None}
    while len(names) < count:
        names["".join(rng.choices(ascii_lowercase, k=6))] = None
    return list(names)


def zeta(alpha: float, terms: int = 64) -> float:
    """Riemann's zeta above 1: a sum, and Euler-Maclaurin for the rest of it.

    Example:
        >>> abs(zeta(2.0) - 3.141592653589793**2 / 6) < 1e-9
        True
    """
    rest = terms ** (1 - alpha) / (alpha - 1) - terms**-alpha / 2 + alpha * terms ** (-alpha - 1) / 12
    return sum(k**-alpha for k in range(1, terms + 1)) + rest
