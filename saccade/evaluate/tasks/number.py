"""Number: as passkey, with ten digits that come in runs, so that a reader must count how often a digit is said."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from saccade.evaluate.tasks.passkey import Passkey


@dataclass(frozen=True)
class Number(Passkey):
    """Ten digits, five of which repeat the one beside them, among lines that repeat themselves.

    Retrieve.Number of InfiniteBench (Zhang et al. 2024, arXiv 2402.13718, code: OpenBMB/InfiniteBench). Score: 1 where
    the first number that is said is the key, digit by digit.

    Args:
        depth: where the line stands, 0 = start, 1 = end (None: uniform).
        max_new_tokens: tokens kept free for the answer.
    """

    name: ClassVar[str] = "number"
    file: ClassVar[str] = __file__
    max_new_tokens: int = 16

    def key(self, rng: Random) -> str:
        """Five random digits, then five times a digit of what is there is doubled."""
        digits = [str(rng.randrange(10)) for _ in range(5)]
        for _ in range(5):
            at = rng.randrange(len(digits))
            digits.insert(at, digits[at])
        return "".join(digits)
