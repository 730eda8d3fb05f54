"""Multi-request: a text is read once, and each question is asked in a copy of its cache, as if it were the only one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

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
class MultiRequest(Worded):
    """Facts planted in a book, read without any question; then questions that know nothing of each other.

    The multi-request mode of SCBench (Li et al. 2024, arXiv 2412.10319, code: microsoft/MInference): a cache that many
    users share. What is thrown away while the text is read was chosen without the question, so a policy that needs to
    see it gains nothing here (`multi-turn` has the other mode). Score: the share of the requests whose whole answer is
    right; rows have each request apart, as `requests`. What comes after the text is read token by token, so that each
    request meets the method's decoding whatever its length, and samples can be read as a batch
    (`saccade.evaluate.dialogue`).

    Args:
        requests: questions, each for another fact.
        asked: the shared text ends with the first question: a policy that prunes by what it looks at then answers that
            one and not the others.
        distractors: further facts of the same form, never asked for.
        value: "number" (7 digits), "pair" (adjective-noun) or "hex" (8 digits).
        max_new_tokens: tokens kept free for an answer.
    """

    name: ClassVar[str] = "multi-request"
    file: ClassVar[str] = __file__
    requests: int = 3
    asked: bool = False
    distractors: int = 3
    value: str = "number"
    max_new_tokens: int = 24

    def __post_init__(self):
        check_counts("MultiRequest", requests=self.requests)
        if self.distractors < 0:
            raise InputError(f"MultiRequest: distractors must be at least 0, got {self.distractors}")
        if self.value not in VALUES:
            raise InputError(f"MultiRequest: unknown value {self.value!r}; known are {', '.join(VALUES)}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        keys, values, facts = draw_facts(rng, self.requests + self.distractors, self.value, said["facts"])
        questions = [say(rng.choice(said["questions"]), key=key) for key in keys[: self.requests]]
        places = [rng.random() for _ in facts]
        hay = books(rng, length)
        special = len(tokenizer("")["input_ids"])
        asks = [tuple(tokenizer(f"\n\n{question}")["input_ids"][special:]) for question in questions]
        shared: tuple[int, ...] = ()
        if self.asked:
            # its last token is read once more, for the answer to begin
            shared, asks[0] = asks[0], asks[0][-1:]
        # each request is by itself, so that the longest one decides
        room = length - len(shared) - max(map(len, asks)) - self.max_new_tokens
        # of few lengths, whatever the questions, so that samples meet in a batch
        room -= (room + len(shared)) % EVEN
        ids, _ = pack(
            tokenizer, room, lambda size: hay.body(size, facts, places), hay.least, hay.most, said["head"], slack=4
        )
        answers = tuple(values[: self.requests])
        return Sample([*ids, *shared], answers[0], self.max_new_tokens, places[0], questions[0], answers, tuple(asks))

    def run(self, loaded: Loaded, cache: Callable[[int], Any], sample: Sample) -> Outcome:
        return self.run_together(loaded, cache, [sample])[0]

    @torch.inference_mode()
    def run_together(self, loaded: Loaded, cache: Callable[[int], Any], samples: Sequence[Sample]) -> list[Outcome]:
        """Samples whose texts are of one length as one batch; token for token as each would be alone."""
        from saccade.evaluate.generate import now, replies

        shared = cache(len(samples[0].ids))
        started = now(loaded.device)
        texts = torch.tensor([one.ids for one in samples], device=loaded.device)
        loaded.model(texts, past_key_values=shared, logits_to_keep=1)
        read = now(loaded.device) - started
        asked, firsts = [], []
        for at in range(len(samples[0].turns)):
            mine = copy.deepcopy(shared)
            if self.asked and at == 0:
                mine.crop(-1)
            rows = [Dialogue([one.turns[at]], Ending.of(loaded, one.max_new_tokens), at_once=1) for one in samples]
            # the times are those of the first request; whoever asks it also waits for the text to be read
            clock = [now(loaded.device) - read, *hold(loaded, rows, mine)]
            firsts = firsts or replies(rows, clock, mine)
            asked.append(rows)
        found = []
        for sample, first, *rows in zip(samples, firsts, *asked, strict=True):
            scores = [exact(row.texts[0], want) for row, want in zip(rows, sample.answers, strict=True)]
            found.append(Outcome(sum(scores) / len(scores), first, {"requests": scores}))
        return found

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        score = mean_score([outcome.score for outcome in outcomes])
        each = zip(*(outcome.parts["requests"] for outcome in outcomes), strict=True)
        row = {"n": score.n, "score": round(score.score, 4), "low": round(score.low, 4), "high": round(score.high, 4)}
        return row | {"requests": [round(sum(request) / len(request), 4) for request in each]}
