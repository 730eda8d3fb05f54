"""MQAR: multi-query associative recall, as Zoology's training and test sets, and as text for models that read text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, check_counts, exact, pack, say, source
from saccade.reader.words import KEYS, VALUES, words

if TYPE_CHECKING:
    from torch import Tensor

# (length, pairs, examples): the mixture that Zoology trains on, and the segments that it is tested on
TRAIN = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
TEST = tuple((length, pairs, 1000) for length, pairs in ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128)))
TEST += ((1024, 256, 1000),)


class Segment(NamedTuple):
    """Sequences of one length and number of pairs: ids and labels [examples, length]; a batch never mixes segments."""

    pairs: int
    ids: Tensor
    labels: Tensor


def segments(
    sizes: tuple[tuple[int, int, int], ...] = TRAIN,
    *,
    vocab: int = 8192,
    power: float = 0.01,
    passes: int = 1,
    noise: bool = True,
    seed: int = 0,
) -> Iterator[Segment]:
    """The data sets of Zoology (Arora et al. 2023, arXiv 2312.04927, code: HazyResearch/zoology), segment by segment.

    The distribution is Zoology's with its defaults; the numbers are drawn by torch, so that its seeds give others.
    Accuracy is the share of right answers among the labelled positions of each sequence, averaged over sequences.

    Args:
        sizes: (length, pairs, examples) of each segment: `TRAIN`, `TEST` or your own.
        vocab: of keys and values together; at least the length.
        power: how late keys come back: 1 evenly, Zoology's 0.01 mostly soon.
        passes: how often the pairs are written before the questions.
        noise: positions without a meaning hold random tokens of the whole vocabulary, not zeros.
        seed: of everything.

    Raises:
        InputError: a length beyond the vocabulary, or pairs that do not fit in it.

    Example:
        >>> [tuple(segment.ids.shape) for segment in segments(((64, 4, 10), (128, 8, 5)))]
        [(10, 64), (5, 128)]
    """
    import torch

    from saccade.evaluate.tasks.recall import recall_batch

    rng = torch.Generator().manual_seed(seed)
    for length, pairs, examples in sizes:
        if length >= vocab:
            raise InputError(f"mqar: length {length} must be below the vocabulary of {vocab}")
        try:
            ids, labels = recall_batch(examples, length, pairs, vocab, rng, power, passes, noise)
        except ValueError as error:
            raise InputError(str(error)) from None
        yield Segment(pairs, ids, labels)


@dataclass(frozen=True)
class Mqar(Worded):
    """Pairs in running text, then some of the keys again with their values; the last of them waits for its value.

    The zero-shot form of the task: nothing is asked in words, the keys that come back show what is wanted. Score: exact
    match of the whole value.

    Args:
        queries: keys that come back, the one that is scored included.
        key: "pair" (adjective-noun), "numbered" or "hex".
        value: "number" (7 digits), "pair" or "hex".
        max_new_tokens: tokens kept free for the answer.
    """

    name: ClassVar[str] = "mqar"
    file: ClassVar[str] = __file__
    queries: int = 4
    key: str = "pair"
    value: str = "number"
    max_new_tokens: int = 24

    def __post_init__(self):
        check_counts("Mqar", queries=self.queries)
        for what, given, known in (("key", self.key, KEYS), ("value", self.value, VALUES)):
            if given not in known:
                raise InputError(f"Mqar: unknown {what} {given!r}; known are {', '.join(known)}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said, names = source(self.name, length, index, seed), self.said, words("test")
        # a key and a value take at least six tokens
        most = max(length // 6, self.queries)
        keys = names.distinct(rng, self.key, most)
        values = names.distinct(rng, self.value, most)
        pairs = [say(said["pair"], key=key, value=value) for key, value in zip(keys, values, strict=True)]
        order = [rng.random() for _ in pairs]

        def asked(size: int) -> list[int]:
            # any `queries` of the pairs that are there, by lot
            return sorted(range(size), key=lambda i: order[i])[: self.queries]

        def question(size: int) -> str:
            *shown, last = asked(size)
            start = said["pair"].partition("{value}")[0]
            return said["join"].join([*(pairs[i] for i in shown), say(start, key=keys[last]).rstrip()])

        def compose(size: int) -> str:
            return said["join"].join(pairs[:size]) + said["turn"] + question(size)

        ids, size = pack(tokenizer, length - self.max_new_tokens, compose, self.queries, most, said["head"])
        last = asked(size)[-1]
        return Sample(ids, values[last], self.max_new_tokens, last / size, question(size))

    def score(self, prediction: str, sample: Sample) -> float:
        # what is said goes on with the next pair
        said = prediction.split(self.said["join"].strip() or "\n", 1)[0]
        return exact(said, sample.answer)
