"""MRCR-like: a long dialogue repeats one request; what was said the second time must be said again, word for word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from string import ascii_letters, digits
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, pack, say, source
from saccade.reader.books import HELD_OUT, held_out
from saccade.reader.words import words

# characters of what is said, and of the word that must come before it
SHORTEST, LONGEST, MARK = 40, 100, 10


@dataclass(frozen=True)
class Mrcr(Worded):
    """Requests for a text of some form on some topic, answered by sentences of books; one request comes again.

    The form of multi-round co-reference resolution (Vodrahalli et al. 2024, arXiv 2409.12640; data set: openai/mrcr).
    The n-th answer to the repeated request must be said after a random word. Score: 0 where the word does not come
    first, else the similarity of the rest to the answer (`difflib` ratio). Departs from it: answers are one sentence
    long, so that small models and short contexts have a chance, and forms and topics are drawn from word lists.

    Args:
        needles: how often the repeated request comes.
        ordinal: which of its answers is asked for, from 1 (None: by lot).
        max_new_tokens: tokens kept free for the answer: at most 111 characters.
    """

    name: ClassVar[str] = "mrcr"
    file: ClassVar[str] = __file__
    needles: int = 2
    ordinal: int | None = None
    max_new_tokens: int = 112

    def __post_init__(self):
        if self.needles < 1 or (self.ordinal is not None and not 1 <= self.ordinal <= self.needles):
            raise InputError(f"Mrcr: needs needles >= 1 and ordinal within them, got {self.needles} and {self.ordinal}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        if self.needles > len(said["ordinals"]):
            raise InputError(
                f"wording of mrcr: {len(said['ordinals'])} ordinals are too few for {self.needles} needles"
            )
        # a request and its answer take at least sixteen tokens
        known = sentences()
        most = min(max(length // 16, 2), len(known) - self.needles)
        answers = rng.sample(known, most + self.needles)
        form, topic = rng.choice(said["forms"]), rng.choice(words("test").nouns)
        others: list[tuple[str, str]] = []
        while len(others) < most:
            # the same form or the same topic may come again, never both
            pair = (rng.choice(said["forms"]), topic if rng.random() < 0.2 else rng.choice(words("test").nouns))
            if pair != (form, topic):
                others.append(pair)
        asked = [(form, topic)] * self.needles + others
        turns = [
            say(said["turn"], form=form, topic=topic, answer=answer)
            for (form, topic), answer in zip(asked, answers, strict=True)
        ]
        which = rng.randrange(self.needles) if self.ordinal is None else self.ordinal - 1
        places = sorted(rng.random() for _ in range(self.needles))
        mark = "".join(rng.choices(ascii_letters + digits, k=MARK))
        question = say(said["question"], mark=mark, ordinal=said["ordinals"][which], form=form, topic=topic)

        def compose(size: int) -> str:
            text = turns[self.needles : self.needles + size]
            for place, turn in reversed(list(zip(places, turns[: self.needles], strict=True))):
                text.insert(int(place * size), turn)
            return "\n".join(text) + "\n\n" + question

        ids, _ = pack(tokenizer, length - self.max_new_tokens, compose, 1, most, said["head"])
        return Sample(ids, f"{mark} {answers[which]}", self.max_new_tokens, places[which], question)

    def score(self, prediction: str, sample: Sample) -> float:
        mark, rest = sample.answer[:MARK], sample.answer[MARK:].strip()
        found = prediction.strip()
        if not found.startswith(mark):
            return 0.0
        return SequenceMatcher(None, found[MARK:].strip(), rest).ratio()


@cache
def sentences() -> tuple[str, ...]:
    """Different sentences of the held-out books, neither short nor long, none with a colon or a quote."""
    text = " ".join(held_out(book) for book in HELD_OUT)
    every = (sentence.strip() for sentence in re.split(r"(?<=[.!?])\s+", text))
    plain = re.compile(r"[A-Z][A-Za-z ,;'-]+[.!?]")
    return tuple(dict.fromkeys(s for s in every if SHORTEST <= len(s) <= LONGEST and plain.fullmatch(s)))
