"""The reader's books: how a text is cleaned, and which books are never trained on."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from saccade.core.errors import FileError, InputError

DATA = Path(__file__).parent / "data"

# one novel and one book of travels: both ship with the package and serve as haystacks, so no training may see them
HELD_OUT = ("the-moonstone", "voyage-of-the-beagle")


def clean(text: str) -> str:
    """Join the lines of each paragraph, drop underscores of italics and runs of blanks; paragraphs keep one blank line.

    Args:
        text: a book whose lines are wrapped by hand.

    Example:
        >>> clean("It was _late_\\nand  dark.\\n\\n\\nHe slept.\\n")
        'It was late and dark.\\n\\nHe slept.'
    """
    text = text.replace("\r\n", "\n").replace("_", "").replace("\ufeff", "")
    paragraphs = (re.sub(r"\s+", " ", paragraph).strip() for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def training(folder: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (name, cleaned text) of every training book in a folder of `.txt` files, in order of names."""
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise FileError(f"no .txt books in {folder}")
    for file in files:
        if file.stem not in HELD_OUT:
            yield file.stem, clean(file.read_text(encoding="utf-8"))


@cache
def held_out(name: str) -> str:
    """The cleaned text of a held-out book that ships with the package.

    Args:
        name: one of `HELD_OUT`.

    Example:
        >>> "diamond" in held_out("the-moonstone").lower()
        True
    """
    if name not in HELD_OUT:
        raise InputError(f"unknown book {name!r}; held out are {', '.join(HELD_OUT)}")
    with lzma.open(DATA / f"{name}.txt.xz", "rt", encoding="utf-8") as file:
        return file.read()
