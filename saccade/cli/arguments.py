"""Arguments that several commands share, and the model they name."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.core.errors import FileError

if TYPE_CHECKING:
    from saccade.evaluate.model import Loaded


def add_model(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """--model, --dtype, --device, --threads."""
    default = None if required else "reader"
    parser.add_argument(
        "--model", default=default, required=required, metavar="reader|PATH", help="the bundled reader, or a folder"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU")
    parser.add_argument("--device", help="cpu, cuda, cuda:0 (default: cuda where there is one)")
    parser.add_argument("--threads", type=positive, help="CPU threads that torch uses (default: torch's own choice)")


def load_model(args: argparse.Namespace) -> Loaded:
    """The model that `add_model`'s arguments ask for; loading says nothing on stdout or stderr."""
    import torch
    from transformers.utils import logging

    from saccade.evaluate.model import load

    if args.threads:
        torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(args.model, args.dtype, args.device)


def positive(text: str) -> int:
    """An int >= 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return value


def numbers(text: str) -> list[int]:
    """Whole numbers >= 1 separated by commas, for argparse."""
    return [positive(part) for part in text.split(",") if part.strip()]


def key_value(text: str) -> tuple[str, int | float | bool | str]:
    """key=value with a number, true/false or a word as value, for argparse.

    Example:
        >>> key_value("budget=0.1"), key_value("keep_newest=false")
        (('budget', 0.1), ('keep_newest', False))
    """
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must be key=value, got {text!r}")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def text_of(path: str) -> str:
    """A text file, "-" for stdin.

    Raises:
        FileError: missing, a folder, or not text.
    """
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FileError(f"{path}: not a text file (UTF-8)") from None
