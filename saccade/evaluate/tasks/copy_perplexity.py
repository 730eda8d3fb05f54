"""Copy-perplexity: a passage of a book comes again much later; how well is it foreseen the second time?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Outcome, Sample, check_depth, passage, source
from saccade.evaluate.tasks.perplexity import UNIT, Tally, spread
from saccade.reader.books import HELD_OUT

if TYPE_CHECKING:
    from saccade.evaluate.model import Loaded


@dataclass(frozen=True)
class CopyPerplexity:
    """A book up to some place, and then a passage of it once more, at the end.

    A signal of retrieval inside natural text: who finds the passage spends almost nothing on it. Score: bits per byte
    of the second copy but for its first tokens, which nothing foretells; lower is better. Half of it is read in the
    pass over the prompt, half token by token: rows have both apart, as `prefill` and `decode`.

    Args:
        count: tokens of the passage.
        cue: of the second copy, those that are not scored.
        depth: where the passage stands first, 0 = start, 1 = right before its copy (None: uniform).
        book: one of `saccade.reader.books.HELD_OUT` (None: alternate).
        text: a text file of your own instead.
    """

    name: ClassVar[str] = "copy-perplexity"
    count: int = 128
    cue: int = 8
    depth: float | None = None
    book: str | None = None
    text: str | None = None

    def __post_init__(self):
        if not 1 <= self.cue < self.count - 1:
            raise InputError(f"CopyPerplexity: needs 1 <= cue < count - 1, got {self.cue} and {self.count}")
        check_depth("CopyPerplexity", self.depth)

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng = source(self.name, length, index, seed)
        special = list(tokenizer("")["input_ids"])
        room = length - len(special) - self.count
        if room < self.count:
            raise InputError(f"copy-perplexity: {length} tokens do not hold a passage of {self.count} twice")
        book = self.book or HELD_OUT[index % len(HELD_OUT)]
        body = passage(tokenizer, room, rng.random(), book, self.text)
        depth = rng.random() if self.depth is None else self.depth
        start = int(depth * (room - self.count))
        return Sample([*special, *body, *body[start : start + self.count]], "", 0, depth)

    def run(self, loaded: Loaded, cache: Callable[[int], Any], sample: Sample) -> Outcome:
        return self.run_together(loaded, cache, [sample])[0]

    def run_together(self, loaded: Loaded, cache: Callable[[int], Any], samples: Sequence[Sample]) -> list[Outcome]:
        """Samples of one length as one batch."""
        from saccade.evaluate.measure import losses_together

        scored = self.count - self.cue
        steps = scored // 2
        texts = [sample.ids for sample in samples]
        nats, took = losses_together(loaded, texts, cache(len(texts[0])), scored=scored, steps=steps)
        stretches = (
            ("all", slice(None)),
            ("prefill", slice(0, scored - steps)),
            ("decode", slice(scored - steps, None)),
        )
        found = []
        for ids, each in zip(texts, nats.tolist(), strict=True):
            bits = {}
            for name, part in stretches:
                tally = Tally(loaded.tokenizer)
                tally.add(ids[-scored:][part], each[part])
                bits[name] = tally.bits
            found.append(Outcome(bits.pop("all") or 0.0, took, bits))
        return found

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        parts = {name: spread([outcome.parts[name] for outcome in outcomes])["score"] for name in ("prefill", "decode")}
        return spread([outcome.score for outcome in outcomes]) | {"unit": UNIT, **parts}
