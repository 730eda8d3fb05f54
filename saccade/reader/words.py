"""Words for keys and values, split by a hash: what the tests ask about, the reader has never been trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from random import Random

from saccade.core.errors import InputError
from saccade.reader.books import DATA

# what names a fact, and what it states
KEYS = ("pair", "numbered", "hex")
VALUES = ("number", "pair", "hex")


@dataclass(frozen=True)
class Words:
    """Adjectives and nouns to draw names from.

    Args:
        adjectives: lower-case words.
        nouns: lower-case words.

    Example:
        >>> words("test").draw(Random(0), "number").isdigit()
        True
    """

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]

    def draw(self, rng: Random, kind: str) -> str:
        """One name: `pair` (amber-lantern), `numbered` (lantern 42), `number` (7 digits) or `hex` (8 digits)."""
        if kind == "pair":
            return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"
        if kind == "numbered":
            return f"{rng.choice(self.nouns)} {rng.randrange(1, 1000)}"
        if kind == "number":
            return str(rng.randrange(1_000_000, 10_000_000))
        if kind == "hex":
            return f"{rng.getrandbits(32):08x}"
        raise InputError(f"unknown kind {kind!r}; known are pair, numbered, number, hex")

    def distinct(self, rng: Random, kind: str, count: int) -> list[str]:
        """`count` different names of one kind."""
        names: dict[str, None] = {}
        for _ in range(100 * count):
            if len(names) == count:
                break
            names[self.draw(rng, kind)] = None
        if len(names) < count:
            raise InputError(f"{count} different names of kind {kind!r} cannot be drawn from these words")
        return list(names)

    def similar(self, rng: Random, count: int) -> Words:
        """Few words that still make at least `count` pairs: names drawn from them resemble each other."""
        side = max(2, int((2 * count) ** 0.5) + 1)
        adjectives = rng.sample(self.adjectives, min(side, len(self.adjectives)))
        return Words(tuple(adjectives), tuple(rng.sample(self.nouns, min(side, len(self.nouns)))))


def is_test(word: str) -> bool:
    """Whether a word is kept for tests: one in five, by its SHA-256."""
    return hashlib.sha256(word.encode()).digest()[0] % 5 == 0


@cache
def words(split: str) -> Words:
    """The words of a split.

    Args:
        split: "train" or "test".
    """
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}; known are train, test")

    def read(name: str) -> tuple[str, ...]:
        lines = (DATA / name).read_text(encoding="utf-8").split()
        return tuple(word for word in lines if is_test(word) == (split == "test"))

    return Words(read("adjectives.txt"), read("nouns.txt"))
