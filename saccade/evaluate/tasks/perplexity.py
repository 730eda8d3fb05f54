"""Perplexity: how well a book goes on, in bits per byte, by how much of it has been read before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Outcome, Sample, check_counts, passage, source
from saccade.reader.books import HELD_OUT

if TYPE_CHECKING:
    from saccade.evaluate.generate import Answer
    from saccade.evaluate.model import Loaded

UNIT = "bits per byte, lower is better"
Z95 = 1.959963984540054

# tokens before the first edge between positions; each further edge is twice as far
FIRST = 64


@dataclass(frozen=True)
class Perplexity:
    """A passage of a held-out book of exactly the length, read with or without sliding windows.

    Score: bits per byte of all tokens but the first, so that tokenizers compare: lower is better, and a row says so in
    `unit`. Its interval is the mean of samples plus and minus 1.96 standard errors (none for one sample). Rows also
    have `prefill` and `decode`, the same of the tokens read in one pass and of those read one by one, and
    `by_position`: [from, to, bits per byte] for positions in the window, where edges double.

    Args:
        window: tokens that are read at once (None: the whole length).
        stride: tokens by which the window moves, each of them scored; the first window scores all (None: as far as a
            window goes).
        steps: tokens at the end that are read one by one, after the pass over all others: where methods for decoding
            and cache policies show.
        book: one of `saccade.reader.books.HELD_OUT` (None: alternate).
        text: a text file of your own instead.

    Raises:
        InputError: sizes that do not fit into one another.
    """

    name: ClassVar[str] = "perplexity"
    window: int | None = None
    stride: int | None = None
    steps: int = 32
    book: str | None = None
    text: str | None = None

    def __post_init__(self):
        check_counts("Perplexity", stride=1 if self.stride is None else self.stride)
        if self.window is not None and self.window < 2:
            raise InputError(f"Perplexity: a window needs two tokens or more, got {self.window}")
        if self.steps < 0:
            raise InputError(f"Perplexity: steps must be at least 0, got {self.steps}")
        if self.stride and (self.window is None or self.stride > self.window):
            raise InputError(f"Perplexity: stride {self.stride} needs a window at least as long, got {self.window}")
        if self.book is not None and self.book not in HELD_OUT:
            raise InputError(f"Perplexity: unknown book {self.book!r}; known are {', '.join(HELD_OUT)}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng = source(self.name, length, index, seed)
        special = list(tokenizer("")["input_ids"])
        book = self.book or HELD_OUT[index % len(HELD_OUT)]
        return Sample([*special, *passage(tokenizer, length - len(special), rng.random(), book, self.text)], "", 0)

    def run(self, loaded: Loaded, cache: Callable[[int], Any], sample: Sample) -> Outcome:
        return self.run_together(loaded, cache, [sample])[0]

    def run_together(self, loaded: Loaded, cache: Callable[[int], Any], samples: Sequence[Sample]) -> list[Outcome]:
        """Samples of one length as one batch; window for window, as each would be alone."""
        from saccade.evaluate.measure import losses_together

        length = len(samples[0].ids)
        tallies = [_Tallies.new(loaded.tokenizer) for _ in samples]
        size = min(self.window or length, length)
        for start, stop, scored in windows(length, size, self.stride or size):
            steps = max(min(self.steps, scored, stop - start - 2), 0) if stop == length else 0
            texts = [sample.ids[start:stop] for sample in samples]
            nats, took = losses_together(loaded, texts, cache(stop - start), scored=scored, steps=steps)
            for own, ids, each in zip(tallies, texts, nats.tolist(), strict=True):
                own.add(ids, each, steps)
        # times and bytes are those of the last window
        return [own.outcome(took) for own in tallies]

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        positions = zip(*(outcome.parts["by_position"] for outcome in outcomes), strict=True)
        return spread([outcome.score for outcome in outcomes]) | {
            "unit": UNIT,
            **{phase: _mean([outcome.parts[phase] for outcome in outcomes]) for phase in ("prefill", "decode")},
            "by_position": [[*rows[0][:2], _mean([row[2] for row in rows])] for rows in positions],
        }


@dataclass
class _Tallies:
    """What one sample adds up to: in all, by phase, by position."""

    tokenizer: Any
    total: Tally
    phases: dict[str, Tally]
    bins: dict[int, Tally]

    @classmethod
    def new(cls, tokenizer: Any) -> _Tallies:
        return cls(tokenizer, Tally(tokenizer), {"prefill": Tally(tokenizer), "decode": Tally(tokenizer)}, {})

    def add(self, ids: Sequence[int], nats: Sequence[float], steps: int) -> None:
        """A window's tokens and the losses of the last of them, of which `steps` were read one by one."""
        at, cut = len(ids) - len(nats), len(nats) - steps
        for first, last in positions(at, len(ids)):
            self.bins.setdefault(edge(first), Tally(self.tokenizer)).add(ids[first:last], nats[first - at : last - at])
        for phase, part in (("prefill", slice(0, cut)), ("decode", slice(cut, None))):
            self.phases[phase].add(ids[at:][part], nats[part])
        self.total.add(ids[at:], nats)

    def outcome(self, took: Answer) -> Outcome:
        """The sample's score and its parts."""
        parts: dict[str, Any] = {phase: tally.bits for phase, tally in self.phases.items()}
        parts["by_position"] = [[max(low, 1), max(2 * low, FIRST), self.bins[low].bits] for low in sorted(self.bins)]
        return Outcome(self.total.bits or 0.0, took, parts)


class Tally:
    """Bits and bytes of pieces of a text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.nats = 0.0
        self.bytes = 0

    def add(self, ids: Sequence[int], nats: Sequence[float]) -> None:
        """Count a piece: its tokens and their losses."""
        self.nats += sum(nats)
        self.bytes += len(self.tokenizer.decode(list(ids)).encode()) if len(ids) else 0

    @property
    def bits(self) -> float | None:
        """Bits per byte of all pieces; None where there are none."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


def windows(total: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, tokens scored at its end) of each window; every token but the first is scored once.

    Example:
        >>> list(windows(10, 6, 3))
        [(0, 6, 5), (3, 9, 3), (4, 10, 1)]
    """
    stop = min(window, total)
    yield 0, stop, stop - 1
    while stop < total:
        # a token is scored by what is before it in the window; the last window moves less than the others
        after = min(stop + min(stride, window - 1), total)
        yield after - window, after, after - stop
        stop = after


def positions(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The stretches of first ... last - 1 within one bin each."""
    while first < last:
        end = min(last, max(2 * edge(first), FIRST))
        yield first, end
        first = end


def edge(position: int) -> int:
    """Where the bin of a position starts: 0, 64, 128, 256, ...

    Example:
        >>> [edge(position) for position in (1, 63, 64, 127, 128, 1000)]
        [0, 0, 64, 64, 128, 512]
    """
    return 0 if position < FIRST else FIRST << (position // FIRST).bit_length() - 1


def spread(scores: Sequence[float]) -> dict[str, Any]:
    """n, score, low and high of scores that are not within 0..1: mean, plus and minus 1.96 standard errors."""
    n, mean = len(scores), math.fsum(scores) / len(scores)
    half = Z95 * math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / (n - 1) / n) if n > 1 else None
    ends = (None, None) if half is None else (round(mean - half, 4), round(mean + half, 4))
    return {"n": n, "score": round(mean, 4), "low": ends[0], "high": ends[1]}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(math.fsum(known) / len(known), 4) if known else None
