"""Haystacks: dull lines, books or facts of the same form, as long as wanted, with other facts planted in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from uuid import UUID

from saccade.core.errors import InputError
from saccade.evaluate.tasks.needle import ROOM, plant, sentence_end
from saccade.reader.books import HELD_OUT, held_out
from saccade.reader.words import KEYS, VALUES, words

UUID_KIND = "uuid"
NAMES = (*KEYS, UUID_KIND)
STATED = (*VALUES, UUID_KIND)


@dataclass(frozen=True)
class Haystack:
    """Text that grows with a size and takes facts in.

    Args:
        text: of a book; the size is its last characters.
        lines: used instead where there are any, from the first on, over and over if `repeated`; the size is lines.
        repeated: lines start again after the last.
        least, most: sizes.

    Example:
        >>> hay = Haystack(lines=("Rain.", "Sun."), repeated=True, most=9)
        >>> hay.body(3, ["Snow!"], [0.5])
        'Rain.\\nSnow!\\nSun.\\nRain.'
    """

    text: str = ""
    lines: tuple[str, ...] = ()
    repeated: bool = False
    least: int = 1
    most: int = 1

    def body(self, size: int, facts: Sequence[str] = (), places: Sequence[float] = ()) -> str:
        """The text of one size with each fact at its place (0 = start, 1 = end); equal places keep their order."""
        if not self.lines:
            return plant(self.text[len(self.text) - size :], facts, places, margin=0)
        parts = [self.lines[i % len(self.lines)] for i in range(size)] if self.repeated else list(self.lines[:size])
        order = sorted(range(len(facts)), key=lambda i: places[i])
        for i in reversed(order):
            parts.insert(int(places[i] * size), facts[i])
        return "\n".join(parts)


def noise(lines: Sequence[str], length: int) -> Haystack:
    """Dull lines over and over, for at most `length` tokens."""
    if not lines:
        raise InputError("wording: noise needs at least one line")
    return Haystack(lines=tuple(lines), repeated=True, most=length)


def books(rng: Random, length: int, book: str | None = None) -> Haystack:
    """A passage of a held-out book (None: either) that ends with a sentence, enough for `length` tokens."""
    text = held_out(book or rng.choice(HELD_OUT))
    room = min(ROOM * length, len(text))
    stop = sentence_end(text, room + int(rng.random() * (len(text) - room)))
    return Haystack(text=text[stop - min(room, stop) : stop], least=min(32, room), most=min(room, stop))


def draw_names(rng: Random, kind: str, count: int) -> list[str]:
    """Different test names of a kind of `saccade.reader.words`, or `uuid` (random, version 4)."""
    if kind != UUID_KIND:
        return words("test").distinct(rng, kind, count)
    return [str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them.

    Example:
        >>> listed(["oak"]), listed(["oak", "elm", "ash"])
        ('oak', 'oak, elm and ash')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
