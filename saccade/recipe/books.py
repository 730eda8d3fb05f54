"""The training books as one row of tokens.

Run `python -m saccade.recipe.books --books DIR --out books.npy` to clean and tokenise a folder of `.txt` files once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np

from saccade.reader.books import training
from saccade.recipe.tokenizer import raw


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
    parser = argparse.ArgumentParser(description="tokenise the training books")
    parser.add_argument("--books", required=True, help="folder of .txt files")
    parser.add_argument("--out", required=True, help="the .npy file to write")
    args = parser.parse_args()
    ids = tokenise(training(args.books), raw())
    np.save(args.out, ids)
    print(f"{len(ids):,} tokens in {args.out}")


if __name__ == "__main__":
    main()
