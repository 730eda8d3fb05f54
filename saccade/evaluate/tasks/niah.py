"""What the four needle families of RULER share: keys with values in a haystack, and a question for some of them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, check_counts, check_depth, contained, pack, say, source
from saccade.evaluate.tasks.haystack import NAMES, STATED, Haystack, books, draw_names, listed, noise

HAYSTACKS = ("noise", "books", "facts")

# facts stand at different ones of so many even depths
DEPTHS = 40


@dataclass(frozen=True)
class Niah(Worded):
    """Keys and values in a haystack; the values of one or more keys are asked for.

    RULER (Hsieh et al. 2024, arXiv 2404.06654, code: NVIDIA/RULER). Score: the share of the asked values that stand
    anywhere in the answer. Departs from RULER: books in the public domain stand in for its essays, a haystack of facts
    never repeats an asked key, and the values are named in the order of their keys.

    Args:
        haystack: "noise" (dull lines), "books" or "facts" (lines of the same form with other keys).
        key: "pair" (adjective-noun), "numbered", "hex" (8 digits) or "uuid".
        value: "number" (7 digits), "pair", "hex" or "uuid".
        keys: keys with values of their own, at least `queries`.
        values: values of each key.
        queries: keys that are asked for.
        depth: where the first fact stands, 0 = start, 1 = end (None: at one of 40 even depths, as the others).
        max_new_tokens: tokens kept free for the answer.
    """

    file: ClassVar[str] = __file__
    name: ClassVar[str] = "niah"
    haystack: str = "books"
    key: str = "pair"
    value: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1
    depth: float | None = None
    max_new_tokens: int = 48

    def __post_init__(self):
        task = type(self).__name__
        for what, given, known in (
            ("haystack", self.haystack, HAYSTACKS),
            ("key", self.key, NAMES),
            ("value", self.value, STATED),
        ):
            if given not in known:
                raise InputError(f"{task}: unknown {what} {given!r}; known are {', '.join(known)}")
        check_counts(task, keys=self.keys, values=self.values, queries=self.queries)
        check_depth(task, self.depth)
        if max(self.keys, self.queries) * self.values > DEPTHS:
            raise InputError(f"{task}: {self.keys} keys of {self.values} values each are more than {DEPTHS} facts")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        keys = draw_names(rng, self.key, max(self.keys, self.queries))
        values = draw_names(rng, self.value, len(keys) * self.values)
        owners = [key for key in keys for _ in range(self.values)]
        facts = [say(said["fact"], key=key, value=value) for key, value in zip(owners, values, strict=True)]
        places = [at / (DEPTHS - 1) for at in rng.sample(range(DEPTHS), len(facts))]
        if self.depth is not None:
            places[0] = self.depth
        asked = self.queries * self.values
        question = say(said["question"], key=listed(keys[: self.queries]))
        hay = self._haystack(rng, length, keys, values)

        def compose(size: int) -> str:
            return hay.body(size, facts, places) + "\n\n" + question

        ids, _ = pack(tokenizer, length - self.max_new_tokens, compose, hay.least, hay.most, said["head"], slack=4)
        answers = tuple(values[:asked])
        return Sample(ids, ", ".join(answers), self.max_new_tokens, places[0], question, answers)

    def score(self, prediction: str, sample: Sample) -> float:
        return contained(prediction, sample.answers)

    def _haystack(self, rng: Random, length: int, keys: list[str], values: list[str]) -> Haystack:
        if self.haystack == "books":
            return books(rng, length)
        if self.haystack == "noise":
            return noise(self.said["noise"], length)
        # a line takes at least eight tokens
        most = max(length // 8, 2)
        others = [name for name in draw_names(rng, self.key, most + len(keys)) if name not in keys][:most]
        stated = [name for name in draw_names(rng, self.value, most + len(values)) if name not in values]
        lines = [say(self.said["fact"], key=key, value=value) for key, value in zip(others, stated, strict=False)]
        return Haystack(lines=tuple(lines), most=most)
