"""What a task is: samples of an exact token budget, and a score for what the model says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from saccade.core.errors import FileError, InputError
from saccade.reader.books import HELD_OUT, held_out

if TYPE_CHECKING:
    from saccade.evaluate.generate import Answer
    from saccade.evaluate.model import Loaded

# prompts of a dialogue have a multiple of so many tokens, so that samples meet in a batch whatever their questions
EVEN = 32


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer.

    Args:
        ids: tokens of the prompt, special tokens included.
        answer: the whole text that is expected.
        max_new_tokens: tokens that may be generated; len(ids) + max_new_tokens <= the length asked for.
        depth: where the fact stands, 0 = start, 1 = end (None where that has no meaning).
        question: the text that was asked.
        answers: all texts that are expected, where there are several.
        turns: tokens of further questions, each asked once the one before it has been answered.
    """

    ids: list[int]
    answer: str
    max_new_tokens: int
    depth: float | None = None
    question: str = ""
    answers: tuple[str, ...] = ()
    turns: tuple[tuple[int, ...], ...] = ()


class Task(Protocol):
    """A benchmark of prompts and answers: the same (length, index, seed) always gives the same sample."""

    name: str

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        """The sample number `index` that fits in `length` tokens, those to be generated included."""
        ...

    def score(self, prediction: str, sample: Sample) -> float:
        """0 to 1 for the text that the model generated."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What came of one sample of a task that reads it in its own way.

    Args:
        score: in the task's unit.
        answer: the times and bytes of the reading.
        parts: scores by turn, by position, ... under their names.
    """

    score: float
    answer: Answer
    parts: dict[str, Any]


class Reading(Protocol):
    """A task that is more than a prompt and its answer: it runs the model itself, in a cache that it is given."""

    name: str

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        """As in `Task`; nothing is generated where max_new_tokens is 0."""
        ...

    def run(self, loaded: Loaded, cache: Callable[[int], Any], sample: Sample) -> Outcome:
        """Read one sample; `cache(tokens)` gives a new cache of the method that is measured."""
        ...

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """n, score, low and high of a row, `unit` where the score is not 0 to 1, and what else is to be kept."""
        ...


@dataclass(frozen=True)
class Worded:
    """A task whose texts stand in a data file beside its module.

    Args:
        wording: a JSON file of your own with the same keys (None: the one that ships).
    """

    file: ClassVar[str]
    wording: str | None = field(default=None, kw_only=True, repr=False)

    @property
    def said(self) -> dict[str, Any]:
        """The texts by name."""
        return texts(self.file, self.wording)


def texts(module: str, path: str | None = None) -> dict[str, Any]:
    """The wording of a task: the JSON file beside its module, or another one with the same keys.

    Raises:
        FileError: a file that cannot be read, or that lacks a key.
    """
    known = _shipped(Path(module).with_suffix(".json"))
    if path is None:
        return known
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"wording {path}: not readable as JSON ({error})") from None
    if not isinstance(given, dict) or given.keys() != known.keys():
        found = ", ".join(given) if isinstance(given, dict) else type(given).__name__
        raise FileError(f"wording {path}: needs the keys {', '.join(known)}; found {found}")
    for key, text in given.items():
        if type(text) is not type(known[key]):
            raise FileError(f"wording {path}: {key} must be a {type(known[key]).__name__}, not {type(text).__name__}")
    return given


@cache
def _shipped(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def say(template: str, **fields: Any) -> str:
    """A template with its fields filled in.

    Example:
        >>> say("The code of {key} is {value}.", key="amber-lantern", value=7)
        'The code of amber-lantern is 7.'
    """
    try:
        return template.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise InputError(f"wording {template!r}: its fields may be {', '.join(fields)}") from None


def exact(prediction: str, answer: str) -> float:
    """1.0 where the prediction up to its first newline is the whole answer.

    Example:
        >>> exact(" 4021932\\nWhat is", "4021932"), exact(" 40219321", "4021932")
        (1.0, 0.0)
    """
    return float(prediction.split("\n", 1)[0].strip() == answer)


def contained(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that stand anywhere in the prediction, in any case: RULER's `all`.

    Example:
        >>> contained("Oak, elm and ash", ["ash", "elm", "fir", "OAK"])
        0.75
    """
    said = prediction.lower()
    return sum(answer.lower() in said for answer in answers) / len(answers)


def aligned(prediction: str, answer: str) -> float:
    """The share of the answer's words that stand at their place in the prediction's first line.

    Example:
        >>> aligned("oak elm\\nash", "oak fir"), aligned("elm oak", "oak elm")
        (0.5, 0.0)
    """
    said, want = prediction.split("\n", 1)[0].split(), answer.split()
    return sum(a == b for a, b in zip(said, want, strict=False)) / len(want)


def first_number(prediction: str) -> str:
    """The first number in a text, as it is written there; "" where there is none.

    Example:
        >>> first_number(" It is -12.5, or 7.")
        '-12.5'
    """
    found = re.search(r"-?\d+(?:\.\d+)?", prediction)
    return found.group() if found else ""


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


def pack(
    tokenizer: Any, target: int, compose: Callable[[int], str], least: int, most: int, head: str = "", slack: int = 0
) -> tuple[list[int], int]:
    """The tokens of a text made of units, exactly `target` of them, and how many units it holds.

    As many units as fit; the rest, less than one more unit adds, is filled with a passage of a book right behind the
    head. So nothing of the composed text is ever cut, and counts and sums over it stay what they are.

    Args:
        tokenizer: of the tested model; its special tokens count.
        target: number of tokens.
        compose: makes the text of a number of units; it must not draw anything at random.
        least, most: units.
        head: text that comes first.
        slack: tokens of the rest that make a search for one more unit worth no more tries.

    Raises:
        InputError: where the fewest units are too long.
    """
    special = len(tokenizer("")["input_ids"])
    front = list(tokenizer(head)["input_ids"])

    def body(size: int) -> list[int]:
        # on a line of its own, whatever fills the rest before it
        return list(tokenizer("\n" + compose(size))["input_ids"])[special:]

    room = target - len(front)
    low, ids = least, body(least)
    if len(ids) > room:
        raise InputError(
            f"no text of {target} tokens could be composed: the shortest has {len(front) + len(ids)}; make the length "
            f"about {len(ids) - room} tokens longer, or ask for fewer facts"
        )
    # the first size known to be too large, and how many tokens it takes
    high, over, tries = most + 1, 0, 0
    while high - low > 1 and room - len(ids) > slack:
        tries += 1
        if over and tries % 3:
            guess = low + int((room - len(ids)) * (high - low) / (over - len(ids)))
        elif over:
            guess = (low + high) // 2
        else:
            guess = int(low * room / max(len(ids), 1)) + 1
        guess = min(max(guess, low + 1), high - 1)
        found = body(guess)
        if len(found) <= room:
            low, ids = guess, found
        else:
            high, over = guess, len(found)
    return front + passage(tokenizer, room - len(ids)) + ids, low


def passage(
    tokenizer: Any, count: int, place: float = 0.1, book: str = HELD_OUT[0], file: str | None = None
) -> list[int]:
    """The tokens of a text from a place on, exactly `count`, no special ones.

    Args:
        tokenizer: of the tested model.
        count: number of tokens.
        place: where in the book, 0 = start, 1 = end; moved up where too little would follow.
        book: one of `saccade.reader.books.HELD_OUT`.
        file: a text file to be read instead.

    Raises:
        InputError: the text is shorter.
        FileError: the file cannot be read.
    """
    special = len(tokenizer("")["input_ids"])
    try:
        text = held_out(book) if file is None else Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if file is None:
            raise
        raise FileError(f"text {file}: cannot be read ({error})") from None
    size = 4 * count + 64
    while True:
        start = min(int(place * len(text)), max(len(text) - size, 0))
        # at the start of a word
        start = text.rfind(" ", 0, start) + 1
        ids = list(tokenizer(text[start : start + size])["input_ids"])[special:]
        if len(ids) >= count:
            return ids[:count]
        if size >= len(text):
            raise InputError(f"{file or book} has {len(ids)} tokens, not {count}; ask for a shorter length")
        size *= 2


def check_depth(task: str, depth: float | None) -> None:
    """Refuse a depth that is not within 0..1."""
    if depth is not None and not 0 <= depth <= 1:
        raise InputError(f"{task}: depth={depth} is not within 0..1")


def check_counts(task: str, **counts: int) -> None:
    """Refuse a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{task}: {name} must be at least 1, got {count}")
