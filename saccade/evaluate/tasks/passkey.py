"""Passkey: one line among dull ones states a number of five digits; the question at the end asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from saccade.evaluate.tasks.base import Sample, Worded, check_depth, first_number, pack, say, source
from saccade.evaluate.tasks.haystack import noise


@dataclass(frozen=True)
class Passkey(Worded):
    """A number hidden among lines that repeat themselves.

    Passkey retrieval of Landmark attention (Mohtashami and Jaggi 2023, arXiv 2305.16300, code:
    epfml/landmark-attention), with the digits of InfiniteBench (arXiv 2402.13718, code: OpenBMB/InfiniteBench): five, a
    leading 0 allowed. Score: 1 where the first number that is said is the key, digit by digit.

    Args:
        depth: where the line stands, 0 = start, 1 = end (None: uniform).
        max_new_tokens: tokens kept free for the answer.

    Example:
        >>> Passkey().score(" 04193. And so on", Sample([], "04193", 12))
        1.0
    """

    name: ClassVar[str] = "passkey"
    file: ClassVar[str] = __file__
    depth: float | None = None
    max_new_tokens: int = 12

    def __post_init__(self):
        check_depth(type(self).__name__, self.depth)

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        key = self.key(rng)
        depth = rng.random() if self.depth is None else self.depth
        hay = noise(said["noise"], length)
        fact = say(said["fact"], value=key)

        def compose(size: int) -> str:
            return hay.body(size, [fact], [depth]) + "\n\n" + said["question"]

        ids, _ = pack(tokenizer, length - self.max_new_tokens, compose, hay.least, hay.most, said["head"])
        return Sample(ids, key, self.max_new_tokens, depth, said["question"])

    def key(self, rng: Random) -> str:
        """Five random digits."""
        return f"{rng.randrange(100_000):05d}"

    def score(self, prediction: str, sample: Sample) -> float:
        return float(first_number(prediction) == sample.answer)
