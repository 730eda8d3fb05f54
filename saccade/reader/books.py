"""The reader's books: how they are read and cleaned, and which ones are never trained on.

Run `python -m saccade.reader.books --books DIR --out books.npy` to clean and tokenise a folder of `.txt` files once.
"""

from __future__ import annotations

import argparse
import lzma
import re
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

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


def tokenise(texts: Iterator[tuple[str, str]], tokenizer) -> np.ndarray:
    """Tokenise books into one row: each starts with the tokenizer's `<bos>`, so the starts can be found again.

    Args:
        texts: (name, text) of each book.
        tokenizer: a `tokenizers.Tokenizer`.

    Shapes:
        -> uint16 [tokens of all books]
    """
    bos = tokenizer.token_to_id("<bos>")
    rows, started = [], time.time()
    for count, (name, text) in enumerate(texts, 1):
        # one paragraph at a time keeps the memory small; a paragraph break is two newline tokens
        break_ids = tokenizer.encode("\n\n", add_special_tokens=False).ids
        encoded = tokenizer.encode_batch(text.split("\n\n"), add_special_tokens=False)
        ids = [bos]
        for index, paragraph in enumerate(encoded):
            ids += paragraph.ids if index == 0 else break_ids + paragraph.ids
        rows.append(np.array(ids, dtype=np.uint16))
        print(f"{count:3d} {name:45s} {len(ids):9,d} tokens  {time.time() - started:5.0f} s", flush=True)
    return np.concatenate(rows)


def main() -> None:
    """Tokenise the training books of a folder into one `.npy` file."""
    from saccade.reader.tokenizer import raw

    parser = argparse.ArgumentParser(description="tokenise the training books")
    parser.add_argument("--books", required=True, help="folder of .txt files")
    parser.add_argument("--out", required=True, help="the .npy file to write")
    args = parser.parse_args()
    ids = tokenise(training(args.books), raw())
    np.save(args.out, ids)
    print(f"{len(ids):,} tokens in {args.out}")


if __name__ == "__main__":
    main()
