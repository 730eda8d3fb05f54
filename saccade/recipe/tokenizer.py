"""The reader's tokenizer: byte-level BPE of 4096, in which every digit and every newline is a token of its own.

Run `python -m saccade.recipe.tokenizer --books DIR` to train it again into the package data.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path

from saccade.reader.books import DATA, training

SPECIALS = ("<bos>", "<eos>", "<pad>")

# words carry the blank before them; digits, newlines and other blanks stand alone, so a text that is put together
# from pieces cut at a blank, a digit or a newline has the tokens of its pieces
SPLIT = r" ?\p{L}+(?:'\p{L}+)?|\p{N}|\n| ?[^\s\p{L}\p{N}]+|\s"


def build(texts, vocab: int = 4096):
    """Train the tokenizer.

    Args:
        texts: iterator of strings.
        vocab: number of tokens, specials and the 256 bytes included.

    Returns:
        a `tokenizers.Tokenizer` that puts `<bos>` before a text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer


def save(tokenizer, folder: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, as `AutoTokenizer` reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@cache
def raw():
    """The bundled tokenizer as a `tokenizers.Tokenizer` (the trainer's workers need no transformers)."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(DATA / "tokenizer.json"))


def main() -> None:
    """Train the tokenizer on a folder of books and write it into the package data."""
    parser = argparse.ArgumentParser(description="train the reader's tokenizer")
    parser.add_argument("--books", required=True, help="folder of .txt files")
    parser.add_argument("--out", default=str(DATA), help="folder to write to (the package data)")
    parser.add_argument("--vocab", type=int, default=4096)
    args = parser.parse_args()
    save(build((text for _, text in training(args.books)), args.vocab), args.out)


if __name__ == "__main__":
    main()
