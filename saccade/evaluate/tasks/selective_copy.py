"""Selective copy: words are scattered among blanks; which were they, in their order?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, aligned, check_counts, pack, say, source
from saccade.reader.words import words


@dataclass(frozen=True)
class SelectiveCopy(Worded):
    """A few words among many blanks, to be said in their order.

    The selective copying task of Mamba (Gu and Dao 2023, arXiv 2312.00752, code: state-spaces/mamba) as text: real
    words for its tokens, so that models that were not trained on it can be asked. Score: the share of the words that
    come at their place.

    Args:
        count: words.
        max_new_tokens: tokens kept free for the answer.
    """

    name: ClassVar[str] = "selective-copy"
    file: ClassVar[str] = __file__
    count: int = 8
    max_new_tokens: int = 80

    def __post_init__(self):
        check_counts("SelectiveCopy", count=self.count)

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        if not said["blank"]:
            raise InputError("wording of selective-copy: the blank must not be empty")
        row = rng.sample(words("test").nouns, self.count)
        places = sorted(rng.random() for _ in row)
        marked = [say(said["mark"], word=word) for word in row]

        def compose(size: int) -> str:
            text = [said["blank"]] * size
            for place, word in reversed(list(zip(places, marked, strict=True))):
                text.insert(int(place * size), word)
            return " ".join(text) + "\n\n" + said["question"]

        ids, _ = pack(tokenizer, length - self.max_new_tokens, compose, 1, length, said["head"])
        return Sample(ids, " ".join(row), self.max_new_tokens, None, said["question"])

    def score(self, prediction: str, sample: Sample) -> float:
        return aligned(prediction, sample.answer)
