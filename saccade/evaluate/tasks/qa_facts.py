"""QA-facts: short biographies and notes on towns; a question that takes one of them, or two in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, pack, say, source
from saccade.reader.words import words

# tokens of the shortest document
SHORTEST = 12


@dataclass(frozen=True)
class QaFacts(Worded):
    """Numbered documents, half of them on people and half on the towns where they were born, and one question.

    The form of RULER's qa tasks (Hsieh et al. 2024, arXiv 2404.06654, code: NVIDIA/RULER), whose SQuAD and HotpotQA
    texts cannot ship; made-up people stand in. Score: 1 where the answer stands anywhere in what is said (RULER's
    `part`). As many documents as fit, at least the two that the question is about.

    Args:
        hops: 1 asks for the town where someone was born, 2 for the river that this town lies on.
        max_new_tokens: tokens kept free for the answer.
    """

    name: ClassVar[str] = "qa-facts"
    file: ClassVar[str] = __file__
    hops: int = 1
    max_new_tokens: int = 32

    def __post_init__(self):
        if self.hops not in (1, 2):
            raise InputError(f"QaFacts: hops must be 1 or 2, got {self.hops}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said, names = source(self.name, length, index, seed), self.said, words("test")
        count = max(length // (2 * SHORTEST), 1)
        drawn = names.distinct(rng, "pair", 3 * count)
        families, towns, rivers = ([place(name) for name in drawn[i::3]] for i in range(3))
        texts: list[str] = []
        people = [f"{rng.choice(said['first-names'])} {family}" for family in families]
        for who, town, river in zip(people, towns, rivers, strict=True):
            year, craft, ware = rng.randrange(1700, 1900), rng.choice(said["crafts"]), rng.choice(said["wares"])
            texts.append(say(said["person"], name=who, town=town, year=year, craft=craft))
            texts.append(say(said["town"], town=town, river=river, ware=ware))
        question = say(said["questions"][self.hops - 1], name=people[0])
        order = [rng.random() for _ in texts]

        def compose(size: int) -> str:
            shown = sorted(range(size), key=lambda i: order[i])
            documents = [say(said["document"], number=n, text=texts[i]) for n, i in enumerate(shown, 1)]
            return "\n\n".join(documents) + "\n\n" + question

        ids, size = pack(tokenizer, length - self.max_new_tokens, compose, 2, len(texts), said["head"])
        # where the person is told of, among all documents
        depth = sum(order[i] < order[0] for i in range(size)) / size
        answer = towns[0] if self.hops == 1 else rivers[0]
        return Sample(ids, answer, self.max_new_tokens, depth, question, (answer,))

    def score(self, prediction: str, sample: Sample) -> float:
        return float(any(answer.lower() in prediction.lower() for answer in sample.answers))


def place(name: str) -> str:
    """A proper name made of two words.

    Example:
        >>> place("amber-lantern")
        'Amberlantern'
    """
    return name.replace("-", "").capitalize()
