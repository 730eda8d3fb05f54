"""What a task is: samples of an exact token budget, and a score for what the model says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from saccade.core.errors import InputError


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer.

    Args:
        ids: tokens of the prompt, special tokens included.
        answer: the whole text that is expected.
        max_new_tokens: tokens that may be generated; len(ids) + max_new_tokens <= the length asked for.
        depth: where the fact stands, 0 = start, 1 = end (None where that has no meaning).
        question: the text that was asked.
    """

    ids: list[int]
    answer: str
    max_new_tokens: int
    depth: float | None = None
    question: str = ""


class Task(Protocol):
    """A benchmark: the same (length, index, seed) always gives the same sample."""

    name: str

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        """The sample number `index` that fits in `length` tokens, those to be generated included."""
        ...

    def score(self, prediction: str, sample: Sample) -> float:
        """0 to 1 for the text that the model generated."""
        ...


def exact(prediction: str, answer: str) -> float:
    """1.0 where the prediction up to its first newline is the whole answer.

    Example:
        >>> exact(" 4021932\\nWhat is", "4021932"), exact(" 40219321", "4021932")
        (1.0, 0.0)
    """
    return float(prediction.split("\n", 1)[0].strip() == answer)


def source(*key: Any) -> Random:
    """A random source that depends on nothing but its key (not on the process, as `hash` would)."""
    return Random("/".join(str(part) for part in key))


def fit(
    tokenizer: Any, target: int, compose: Callable[[int], str], size: int, slack: int = 12, front: bool = True
) -> list[int]:
    """The tokens of a composed text, exactly `target` of them.

    Grows or shrinks the text until it has `target` tokens or up to `slack` more, then cuts the excess away.

    Args:
        tokenizer: of the tested model; its special tokens count.
        target: number of tokens.
        compose: makes a text of about a given size; its unit (characters, lines) does not matter.
        size: first guess.
        slack: most tokens to cut; at least what one unit of size adds.
        front: whether to cut right after the special tokens (True) or at the end.

    Raises:
        InputError: where no size gives the target.
    """
    prefix = list(tokenizer("")["input_ids"])
    low, high = 0, None
    for _ in range(24):
        ids = list(tokenizer(compose(size))["input_ids"])
        excess = len(ids) - target
        if 0 <= excess <= slack:
            if not front:
                return ids[:target]
            return prefix + ids[len(prefix) + excess :]
        if excess < 0:
            low = max(low, size)
        else:
            high = size if high is None else min(high, size)
        guess = size + round((slack / 2 - excess) * size / max(len(ids), 1))
        if high is not None and not low < guess < high:
            guess = (low + high) // 2
        elif guess <= low:
            guess = low + max(1, low // 8)
        if guess == size:
            break
        size = guess
    raise InputError(
        f"no text of {target} tokens could be composed (last: {len(ids)} tokens); ask for a longer one, or fewer facts"
    )
