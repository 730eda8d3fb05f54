"""Copy: a row of random words stands somewhere in a book; its first words come again at the end, what comes next?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, aligned, check_depth, pack, say, source
from saccade.evaluate.tasks.haystack import books
from saccade.reader.words import words


@dataclass(frozen=True)
class Copy(Worded):
    """A row of random words to be written again from its first ones on.

    The copying task (Jelassi et al. 2024, arXiv 2402.01032) inside book text: the row stands at a depth that varies, so
    that no fixed distance to look back helps. Score: the share of the words that come at their place.

    Args:
        count: words of the row.
        cue: of them, those that are given again.
        depth: where the row stands, 0 = start, 1 = end (None: uniform).
        max_new_tokens: tokens kept free for the answer.
    """

    name: ClassVar[str] = "copy"
    file: ClassVar[str] = __file__
    count: int = 8
    cue: int = 3
    depth: float | None = None
    max_new_tokens: int = 64

    def __post_init__(self):
        if not 1 <= self.cue < self.count:
            raise InputError(f"Copy: needs 1 <= cue < count, got cue {self.cue} and count {self.count}")
        check_depth("Copy", self.depth)

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        row = rng.sample(words("test").nouns, self.count)
        depth = rng.random() if self.depth is None else self.depth
        question = say(said["again"], words=" ".join(row[: self.cue]))
        fact = say(said["row"], words=" ".join(row))
        hay = books(rng, length)

        def compose(size: int) -> str:
            return hay.body(size, [fact], [depth]) + "\n\n" + question

        ids, _ = pack(tokenizer, length - self.max_new_tokens, compose, hay.least, hay.most, said["head"], slack=4)
        return Sample(ids, " ".join(row[self.cue :]), self.max_new_tokens, depth, question)

    def score(self, prediction: str, sample: Sample) -> float:
        return aligned(prediction, sample.answer)
