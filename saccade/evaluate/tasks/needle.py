"""Needle: one sentence in a long book states a code; the question at the end asks for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, check_depth, exact, fit, say, source, texts
from saccade.reader.books import HELD_OUT, held_out
from saccade.reader.words import VALUES, words

# a fact right before the question (1) needs no long reach, so the default depths leave it out
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8)

# characters before the first fact: `fit` cuts at most a dozen tokens there
MARGIN = 200

# characters of book text kept before the end of a sample, per token of its length; no tokenizer packs English tighter
ROOM = 8


def templates() -> dict[str, list[str]]:
    """The wording of facts and questions, from `needle.json`."""
    return texts(__file__)


@dataclass(frozen=True)
class Needle(Worded):
    """Facts planted in book text, one of them asked for at the end.

    Books and key words are none that the bundled reader was trained on. Score: exact match of the whole answer.

    Args:
        book: one of `saccade.reader.books.HELD_OUT` (None: alternate).
        distractors: further facts of the same form with other keys.
        depth: where the fact stands, 0 = start, 1 = end (None: 0, .2, .4, .6, .8 in turn).
        value: "number" (7 digits), "pair" (adjective-noun) or "hex" (8 digits).
        planted: False leaves the asked fact out: the control for guessing.
        max_new_tokens: tokens kept free for the answer.

    Example:
        >>> from saccade.reader import load  # doctest: +SKIP
        >>> model, tokenizer = load()  # doctest: +SKIP
        >>> sample = Needle(depth=0.5).sample(tokenizer, length=4096, index=0)  # doctest: +SKIP
        >>> len(sample.ids) + sample.max_new_tokens  # doctest: +SKIP
        4096
    """

    name: ClassVar[str] = "needle"
    file: ClassVar[str] = __file__
    book: str | None = None
    distractors: int = 0
    depth: float | None = None
    value: str = "number"
    planted: bool = True
    max_new_tokens: int = 24

    def __post_init__(self):
        if self.book is not None and self.book not in HELD_OUT:
            raise InputError(f"Needle: unknown book {self.book!r}; known are {', '.join(HELD_OUT)}")
        check_depth("Needle", self.depth)
        if self.value not in VALUES:
            raise InputError(f"Needle: unknown value {self.value!r}; known are {', '.join(VALUES)}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng = source(self.name, length, index, seed)
        text = held_out(self.book or HELD_OUT[index % len(HELD_OUT)])
        depth = DEPTHS[index // len(HELD_OUT) % len(DEPTHS)] if self.depth is None else self.depth
        keys, values, facts = draw_facts(rng, 1 + self.distractors, self.value, self.said["facts"])
        question = say(rng.choice(self.said["questions"]), key=keys[0])
        places = [depth] + [rng.random() for _ in facts[1:]]
        # grows towards the front, so that the end of the book text stays where it is
        room = min(ROOM * length, len(text))
        stop = sentence_end(text, room + int(rng.random() * (len(text) - room)))
        skip = 0 if self.planted else 1

        def compose(size: int) -> str:
            body = text[max(0, stop - size) : stop]
            return plant(body, facts[skip:], places[skip:]) + f"\n\n{question}"

        ids = fit(tokenizer, length - self.max_new_tokens, compose, size=3 * length)
        return Sample(ids, values[0], self.max_new_tokens, depth, question)

    def score(self, prediction: str, sample: Sample) -> float:
        return exact(prediction, sample.answer)


def draw_facts(rng: Random, count: int, value: str, wordings: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Different keys, their values, and a sentence for each."""
    names = words("test")
    keys = names.distinct(rng, "pair", count)
    values = names.distinct(rng, value, count)
    facts = [say(rng.choice(wordings), key=key, value=said) for key, said in zip(keys, values, strict=True)]
    return keys, values, facts


def sentence_end(text: str, place: int) -> int:
    """The first place at or after `place` where a sentence has ended (the last one before it where none follows)."""
    found = re.compile(r"[.!?](?= )").search(text, place)
    if found:
        return found.end()
    return max(text.rfind(". ", 0, place), 0) + 1


def plant(body: str, facts: Sequence[str], places: Sequence[float], margin: int = MARGIN) -> str:
    """Put sentences into a text, each at the sentence end that follows its place (0 = start, 1 = end).

    Example:
        >>> plant("One day. Two days. Three.", ["It rained."], [0.5], margin=0)
        'One day. Two days. It rained. Three.'
    """
    starts = [sentence_end(body, margin + int(place * (len(body) - margin))) for place in places]
    starts = [len(body) if place >= 1 else start for place, start in zip(places, starts, strict=True)]
    parts, past = [], 0
    for start, fact in sorted(zip(starts, facts, strict=True), key=lambda pair: pair[0]):
        parts += [body[past:start], f" {fact}"]
        past = start
    return "".join([*parts, body[past:]])


@dataclass(frozen=True)
class Document:
    """A text with facts in it, to be asked about again and again.

    Args:
        text: the document, without any question.
        ids: its tokens, special tokens included.
        facts: the planted sentences, in order.
        questions: one per fact; append `"\\n\\n" + question` to the document.
        answers: one per fact.
        places: where each fact stands, 0 = start, 1 = end.
    """

    text: str
    ids: list[int]
    facts: list[str]
    questions: list[str]
    answers: list[str]
    places: list[float]


def compose(
    tokenizer: Any, length: int, facts: int = 4, seed: int = 0, book: str = HELD_OUT[0], value: str = "number"
) -> Document:
    """One document of exactly `length` tokens: a held-out book from the start of a chapter on, facts planted in it.

    Args:
        tokenizer: of the model that will read it.
        length: tokens of the document, special tokens included.
        facts: number of planted facts, spread evenly from early to late.
        seed: which chapter, keys and values.
        book: one of `saccade.reader.books.HELD_OUT`.
        value: "number", "pair" or "hex".

    Example:
        >>> document = compose(tokenizer, 16384, facts=4)  # doctest: +SKIP
        >>> prompt = document.text + "\\n\\n" + document.questions[0]  # doctest: +SKIP
    """
    rng = source("compose", length, facts, seed, book)
    text = held_out(book)
    keys, answers, sentences = draw_facts(rng, facts, value, templates()["facts"])
    questions = [rng.choice(templates()["questions"]).format(key=key) for key in keys]
    places = [(i + 0.2 + 0.6 * rng.random()) / facts for i in range(facts)]
    # the table of contents names chapters too: those have no text of their own
    chapters = [m.start() + 2 for m in re.finditer(r"\n\nCHAPTER [IVXL]+[^\n]{0,200}\n\n(?=[^\n]{200})", text)] or [0]
    roomy = [start for start in chapters if len(text) - start > 5 * length] or chapters[:1]
    start = rng.choice(roomy)
    # the facts' places must not move while the text is fitted, so they are counted in a body of fixed size
    pick: dict[int, str] = {}

    def build(size: int) -> str:
        pick[size] = plant(text[start : start + size], sentences, [0.98 * place for place in places])
        return pick[size]

    ids = fit(tokenizer, length, build, size=3 * length, front=False)
    special = len(tokenizer("")["input_ids"])
    return Document(tokenizer.decode(ids[special:]), ids, sentences, questions, answers, places)
