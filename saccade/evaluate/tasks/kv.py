"""Key-value: a long list of pairs, one to a line; the question at the end asks for one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, exact, fit, say, source, texts
from saccade.reader.words import KEYS, VALUES, words

# lines before the first pair that is asked for: `fit` cuts into the first ones
MARGIN = 8


def templates() -> dict[str, list[str]]:
    """The wording of pairs and questions, from `kv.json`."""
    return texts(__file__)


@dataclass(frozen=True)
class KeyValue(Worded):
    """A list of `key: value` lines that fills the length, then one question. Score: exact match of the whole answer.

    Args:
        key: "pair" (adjective-noun), "numbered" (noun and number) or "hex" (8 digits).
        value: "number" (7 digits), "pair" or "hex".
        max_new_tokens: tokens kept free for the answer.

    Example:
        >>> KeyValue().score(" 4021932\\n", Sample([], "4021932", 24))
        1.0
    """

    name: ClassVar[str] = "kv"
    file: ClassVar[str] = __file__
    key: str = "pair"
    value: str = "number"
    max_new_tokens: int = 24

    def __post_init__(self):
        if self.key not in KEYS:
            raise InputError(f"KeyValue: unknown key {self.key!r}; known are {', '.join(KEYS)}")
        if self.value not in VALUES:
            raise InputError(f"KeyValue: unknown value {self.value!r}; known are {', '.join(VALUES)}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng = source(self.name, length, index, seed)
        # never more lines than tokens / 6: a key and a value take at least that
        most = max(length // 6, 2 * MARGIN)
        keys = words("test").distinct(rng, self.key, most)
        values = [words("test").draw(rng, self.value) for _ in keys]
        pair = rng.choice(self.said["pairs"])
        wording = rng.choice(self.said["questions"])
        lines = [say(pair, key=key, value=value) for key, value in zip(keys, values, strict=True)]
        depth = rng.random()

        def asked(size: int) -> int:
            return min(MARGIN + int(depth * (size - MARGIN)), size - 1)

        def compose(size: int) -> str:
            size = max(size, MARGIN + 1)
            used.append(size)
            return "\n".join(lines[:size]) + "\n\n" + say(wording, key=keys[asked(size)])

        used: list[int] = []
        ids = fit(tokenizer, length - self.max_new_tokens, compose, size=max(length // 18, MARGIN + 1), slack=64)
        place = asked(used[-1])
        return Sample(ids, values[place], self.max_new_tokens, depth, say(wording, key=keys[place]))

    def score(self, prediction: str, sample: Sample) -> float:
        return exact(prediction, sample.answer)
