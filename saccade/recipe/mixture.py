"""The training mixture: what the documents are made of, and how much each of their tokens counts."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from saccade.core.errors import InputError
from saccade.evaluate.tasks import kv, needle
from saccade.reader.words import KEYS, VALUES, Words, words

# what a token is a target of; its weight in the loss
TAGS = ("ignored", "text", "filler", "needle", "pair", "copy", "chain")
IGNORED, TEXT, FILLER, NEEDLE, PAIR, COPY, CHAIN = range(len(TAGS))
WEIGHTS = (0.0, 0.5, 0.15, 4.0, 2.0, 1.0, 4.0)

# share of documents of each kind
SHARES = {"book": 0.25, "facts": 0.40, "pairs": 0.19, "copies": 0.10, "chains": 0.06}

# share of rows that are packed with several shorter documents
PACKED = 0.2

CHAIN_STATEMENTS = (" Let {a} be {b}.", " Set {a} to {b}.", " From here on {a} equals {b}.")
CHAIN_QUESTIONS = ("What does {key} come to? It comes to", "Question: what is {key} in the end?\nAnswer:")

Piece = tuple[Sequence[int], int]


class Mixture:
    """Draws rows of tokens, each token tagged with what it teaches.

    A piece of text is tokenised on its own and put between pieces of books that were tokenised before; the tokenizer
    splits at blanks, digits and newlines, so the row has the tokens that its text would have.

    Args:
        books: tokens of the training books, each book starting with `<bos>`.
        tokenizer: a `tokenizers.Tokenizer`.
        split: which words name facts: "train" or "test".

    Shapes:
        books [tokens] -> rows: ids int16 [length], tags uint8 [length]
    """

    def __init__(self, books: np.ndarray, tokenizer: Any, split: str = "train"):
        self.books = books.astype(np.int16)
        self.tokenizer = tokenizer
        self.words = words(split)
        self.vocab = tokenizer.get_vocab_size()
        self.bos = tokenizer.token_to_id("<bos>")
        self.starts = np.flatnonzero(self.books == self.bos)
        self.stops = np.append(self.starts[1:], len(self.books))
        said = [tokenizer.decode([index], skip_special_tokens=False) for index in range(self.vocab)]
        ends = np.array([text.endswith((".", "!", "?")) for text in said])
        blank = np.array([text.startswith(" ") for text in said])
        # a sentence may be put in before these positions
        self.breaks = np.flatnonzero(ends[self.books[:-1]] & blank[self.books[1:]]) + 1

    def row(self, rng: Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One long document, or, at times, several shorter ones one after the other."""
        if rng.random() >= PACKED or length < 512:
            return self.document(rng, length)
        rows, left = [], length
        while left:
            part = int(128 * (length / 128) ** rng.random())
            part = left if left - part < 128 else part
            rows.append(self.document(rng, part))
            left -= part
        return np.concatenate([ids for ids, _ in rows]), np.concatenate([tags for _, tags in rows])

    def document(self, rng: Random, length: int, kind: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """A document of exactly `length` tokens, `<bos>` included; `kind` is a key of `SHARES` (None: drawn)."""
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0] if kind is None else kind
        pieces: list[Piece] = [([self.bos], IGNORED), *getattr(self, kind)(rng, length - 1)]
        ids = np.concatenate([np.asarray(piece, dtype=np.int16) for piece, _ in pieces])
        tags = np.concatenate([np.full(len(piece), tag, dtype=np.uint8) for piece, tag in pieces])
        # a last piece that does not fit is cut; only the shortest documents have one
        return ids[:length], tags[:length]

    def book(self, rng: Random, size: int) -> list[Piece]:
        """A span of one book."""
        start = self.span(rng, size)
        return [(self.books[start : start + size], TEXT)]

    def facts(self, rng: Random, size: int) -> list[Piece]:
        """Facts planted in book text, asked for at the end or on the way."""
        most = max(1, min(200, size // 40))
        count = most if rng.random() < 0.3 else int(most ** rng.random())
        facts = self.draw(rng, count, needle.templates()["facts"], " ")
        asked = needle.templates()["questions"]
        skew = rng.choice((1.0, 1.0, 2.0))
        planted = [(rng.random() ** skew, [(self.encode(text), IGNORED)]) for _, _, text in facts]
        quota = max(1, min(192, size // 60))
        quota = quota if rng.random() < 0.5 else int(quota ** rng.random())
        if rng.random() < 0.5:
            picks = rng.sample(range(len(facts)), min(quota, len(facts)))
            return self.plant(rng, size, planted, self.quiz(rng, [facts[i] for i in picks], asked, NEEDLE))
        for i in (rng.randrange(len(facts)) for _ in range(quota)):
            later = planted[i][0] + (1 - planted[i][0]) * rng.random()
            planted.append((later, [*self.quiz(rng, [facts[i]], asked, NEEDLE), (self.encode("\n"), IGNORED)]))
        return self.plant(rng, size, planted, [])

    def pairs(self, rng: Random, size: int) -> list[Piece]:
        """A list of key-value lines, then questions."""
        most = max(2, size // 9)
        lines = self.draw(rng, most, [rng.choice(kv.templates()["pairs"])], "", alike=0.1)
        encoded: list[list[int]] = []
        room = size * rng.choice((0.6, 0.8, 1.0))
        for _, _, text in lines:
            if room <= 0:
                break
            encoded.append(self.encode(text + "\n"))
            room -= len(encoded[-1])
        quota = min(len(encoded), max(1, min(192, size // 60)))
        asked = rng.sample(lines[: len(encoded)], quota if rng.random() < 0.5 else max(1, int(quota ** rng.random())))
        tail = self.quiz(rng, asked, kv.templates()["questions"], PAIR, before="\n")
        # the list takes what the questions leave: cut at the front, or filled up with text before it
        head = [token for line in encoded for token in line]
        left = size - sum(len(ids) for ids, _ in tail)
        if left < 0:
            return [(head[:1], IGNORED), *tail]
        if len(head) >= left:
            return [(head[len(head) - left :], IGNORED), *tail]
        head = [*self.encode("\n\n"), *head][-left:]
        start = self.span(rng, left - len(head))
        return [(self.books[start : start + left - len(head)], FILLER), (head, IGNORED), *tail]

    def copies(self, rng: Random, size: int) -> list[Piece]:
        """Spans of noise or of a book, and later each of them again."""
        planted = []
        most = max(1, min(64, size // 256))
        for _ in range(most if rng.random() < 0.3 else int(most ** rng.random())):
            count = int(8 * max(1, min(32, size // 64)) ** rng.random())
            if rng.random() < 0.5:
                ids = [rng.randrange(3, self.vocab) for _ in range(count)]
            else:
                start = self.span(rng, count)
                ids = self.books[start : start + count].tolist()
            first, second = sorted((rng.random(), rng.random()))
            planted.append((first, [(ids, IGNORED)]))
            # nothing tells that a copy begins: its first tokens do
            planted.append((second, [(ids[:3], IGNORED), (ids[3:], COPY)]))
        return self.plant(rng, size, planted, [])

    def chains(self, rng: Random, size: int) -> list[Piece]:
        """Names set to values or to other names, scattered in order over book text; what is each in the end?"""
        planted, asked = [], []
        most = max(1, min(32, size // 160))
        count = most if rng.random() < 0.3 else int(most ** rng.random())
        names = self.words.distinct(rng, rng.choice(("pair", "numbered")), 4 * count)
        value = rng.choice(VALUES)
        for chain in range(count):
            hops = rng.randint(1, 4)
            places = sorted(rng.random() for _ in range(hops))
            said = result = self.words.draw(rng, value)
            for name, place in zip(names[4 * chain : 4 * chain + hops], places, strict=True):
                text = rng.choice(CHAIN_STATEMENTS).format(a=name, b=said)
                planted.append((place, [(self.encode(text), IGNORED)]))
                said = name
            asked.append((said, result, ""))
        rng.shuffle(asked)
        return self.plant(rng, size, planted, self.quiz(rng, asked, CHAIN_QUESTIONS, CHAIN))

    def draw(
        self, rng: Random, count: int, templates: Sequence[str], before: str, alike: float = 0.3
    ) -> list[tuple[str, str, str]]:
        """(key, value, sentence) of different keys, which at times resemble each other."""
        kind = rng.choices(KEYS, (0.6, 0.2, 0.2))[0]
        pool: Words = self.words
        if kind == "pair" and rng.random() < alike:
            pool = pool.similar(rng, count)
        keys = pool.distinct(rng, kind, count)
        kinds = (rng.choices(VALUES, (0.6, 0.2, 0.2))[0],) if rng.random() < 0.5 else VALUES
        values = [self.words.draw(rng, rng.choice(kinds)) for _ in keys]
        return [
            (key, value, before + rng.choice(templates).format(key=key, value=value))
            for key, value in zip(keys, values, strict=True)
        ]

    def quiz(
        self, rng: Random, facts: Sequence[tuple[str, str, str]], asked: Sequence[str], tag: int, before: str = "\n\n"
    ) -> list[Piece]:
        """Questions one after the other, each with its answer and the newline that closes it."""
        gap = rng.choice(("", "\n"))
        pieces: list[Piece] = []
        for number, (key, value, _) in enumerate(facts):
            question = rng.choice(asked).format(key=key)
            pieces.append((self.encode((gap if number else before) + question), IGNORED))
            pieces.append((self.encode(f" {value}\n"), tag))
        return pieces

    def plant(self, rng: Random, size: int, planted: list[tuple[float, list[Piece]]], tail: list[Piece]) -> list[Piece]:
        """Book text with pieces at the sentence ends next to their places (0 = start, 1 = end): `size` tokens."""
        left = size - sum(len(ids) for ids, _ in tail)
        left -= sum(len(ids) for _, pieces in planted for ids, _ in pieces)
        if left < 0:
            # the pieces do not fit in so short a document
            return self.book(rng, size)
        start = self.span(rng, left)
        near = self.breaks[np.searchsorted(self.breaks, start) : np.searchsorted(self.breaks, start + left)] - start
        woven: list[Piece] = []
        past = 0
        for place, pieces in sorted(planted, key=lambda item: item[0]):
            slot = np.searchsorted(near, place * left)
            spot = int(near[slot]) if slot < len(near) else left
            woven += [(self.books[start + past : start + spot], FILLER), *pieces]
            past = spot
        return [*woven, (self.books[start + past : start + left], FILLER), *tail]

    def span(self, rng: Random, size: int) -> int:
        """Where a span of `size` tokens within one book starts; every such span is equally likely."""
        room = np.maximum(self.stops - self.starts - size, 0)
        total = int(room.sum())
        if not total:
            raise InputError(f"no book holds {size} tokens")
        place = rng.randrange(total)
        book = int(np.searchsorted(np.cumsum(room), place, side="right"))
        return int(self.starts[book] + 1 + place - (np.cumsum(room)[book] - room[book]))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids
