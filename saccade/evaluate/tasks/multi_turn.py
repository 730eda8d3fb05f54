"""Multi-turn: several questions in a row on a text that was read once; what the first one threw away is missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.dialogue import Dialogue, Ending, hold
from saccade.evaluate.metrics import mean_score
from saccade.evaluate.tasks.base import EVEN, Outcome, Sample, Worded, check_counts, exact, pack, say, source
from saccade.evaluate.tasks.haystack import books
from saccade.evaluate.tasks.needle import draw_facts
from saccade.reader.words import VALUES

if TYPE_CHECKING:
    from saccade.evaluate.model import Loaded


@dataclass(frozen=True)
class MultiTurn(Worded):
    """Facts planted in a book; the first question comes with the text, the others one by one after its answer.

    The multi-turn mode of SCBench (Li et al. 2024, arXiv 2412.10319, code: microsoft/MInference). All turns share one
    cache: a policy that keeps what the first question looks at answers that one and not the others. Score: the share of
    the turns whose whole answer is right; rows have each turn apart, as `turns`, the first one first. The dialogue goes
    on with what the model said, right or wrong. What comes after the text is read token by token, the later questions
    too, so that they meet the method's decoding whatever their length, and samples can be read as a batch
    (`saccade.evaluate.dialogue`).

    Args:
        turns: questions, each for another fact.
        distractors: further facts of the same form, never asked for.
        value: "number" (7 digits), "pair" (adjective-noun) or "hex" (8 digits).
        max_new_tokens: tokens kept free for each answer.
    """

    name: ClassVar[str] = "multi-turn"
    file: ClassVar[str] = __file__
    turns: int = 3
    distractors: int = 3
    value: str = "number"
    max_new_tokens: int = 24

    def __post_init__(self):
        check_counts("MultiTurn", turns=self.turns)
        if self.distractors < 0:
            raise InputError(f"MultiTurn: distractors must be at least 0, got {self.distractors}")
        if self.value not in VALUES:
            raise InputError(f"MultiTurn: unknown value {self.value!r}; known are {', '.join(VALUES)}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        keys, values, facts = draw_facts(rng, self.turns + self.distractors, self.value, said["facts"])
        questions = [say(rng.choice(said["questions"]), key=key) for key in keys[: self.turns]]
        places = [rng.random() for _ in facts]
        hay = books(rng, length)
        special = len(tokenizer("")["input_ids"])
        # an answer ends with a line break that is not read again
        later = tuple(tuple(tokenizer(f"\n{question}")["input_ids"][special:]) for question in questions[1:])

        def compose(size: int) -> str:
            return hay.body(size, facts, places) + "\n\n" + questions[0]

        room = length - self.turns * self.max_new_tokens - sum(map(len, later))
        # of few lengths, whatever the questions, so that samples meet in a batch
        ids, _ = pack(tokenizer, room - room % EVEN, compose, hay.least, hay.most, said["head"], slack=4)
        answers = tuple(values[: self.turns])
        return Sample(ids, answers[0], self.max_new_tokens, places[0], questions[0], answers, later)

    def run(self, loaded: Loaded, cache: Callable[[int], Any], sample: Sample) -> Outcome:
        return self.run_together(loaded, cache, [sample])[0]

    def run_together(self, loaded: Loaded, cache: Callable[[int], Any], samples: Sequence[Sample]) -> list[Outcome]:
        """Samples whose texts are of one length as one batch; token for token as each would be alone."""
        from saccade.evaluate.generate import now, replies

        rows = [Dialogue((one.ids, *one.turns), Ending.of(loaded, one.max_new_tokens)) for one in samples]
        shared = cache(len(samples[0].ids))
        clock = [now(loaded.device), *hold(loaded, rows, shared)]
        found = []
        # the times are those of the first turn, which reads the text
        for row, sample, first in zip(rows, samples, replies(rows, clock, shared), strict=True):
            scores = [exact(text, want) for text, want in zip(row.texts, sample.answers, strict=True)]
            found.append(Outcome(sum(scores) / len(scores), first, {"turns": scores}))
        return found

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        score = mean_score([outcome.score for outcome in outcomes])
        turns = zip(*(outcome.parts["turns"] for outcome in outcomes), strict=True)
        row = {"n": score.n, "score": round(score.score, 4), "low": round(score.low, 4), "high": round(score.high, 4)}
        return row | {"turns": [round(sum(turn) / len(turn), 4) for turn in turns]}
