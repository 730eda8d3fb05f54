"""The bundled reader: a decoder of seven million weights that looks things up at up to 32,768 tokens, on a laptop.

`load()` gives the model and its tokenizer from the package itself. Everything else here made them: the books and
words, the training mixture, the trainer, the export to Llama's format and the acceptance test. The model card,
`saccade/reader/data/MODEL_CARD.md`, says how it was trained and what it can do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade.core.errors import FileError, UnsupportedError

if TYPE_CHECKING:
    import torch

__all__ = ["load", "path"]

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
REMEDY = "reinstall saccade, or copy the file from a fresh checkout"


def path() -> Path:
    """The folder of the reader's weights, config and tokenizer, for tools that load a model from a folder.

    Example:
        >>> path().name
        'data'
    """
    return Path(__file__).parent / "data"


def load(dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """The bundled reader through `AutoModelForCausalLM` and `AutoTokenizer`: offline, silent, in evaluation mode.

    Args:
        dtype: of the weights (default: float32; they are stored as bfloat16).
        device: where to put the model.

    Returns:
        (model, tokenizer): a `LlamaForCausalLM` and a fast tokenizer.

    Raises:
        FileError: a file of the reader is missing or damaged.
        UnsupportedError: transformers is not installed.

    Example:
        >>> model, tokenizer = load()
        >>> model.num_parameters()
        6951168
        >>> text = "The code of the amber lantern is 4021932. " + "It rained. " * 20
        >>> ids = tokenizer(text + "\\n\\nWhat is the code of the amber lantern? It is", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0, -8:])
        ' 4021932'
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UnsupportedError('the reader needs transformers: pip install "saccade[hf]"') from error

    folder = path()
    check(folder)
    with silent():
        try:
            # loaders raise whatever the broken file makes them raise
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32 if dtype is None else dtype, local_files_only=True
            )
        except Exception as error:
            said = str(error).strip().split("\n")[0][:200]
            raise FileError(f"the reader in {folder} cannot be read ({said}); {REMEDY}") from error
    return model.to(device).eval(), tokenizer


def check(folder: Path) -> None:
    """Raise `FileError` where a file of the reader is missing, cut off or not JSON."""
    from safetensors import SafetensorError, safe_open

    for name in FILES:
        file = folder / name
        if not file.is_file():
            raise FileError(f"the reader's {name} is not in {folder}; {REMEDY}")
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            else:
                with safe_open(file, "pt"):
                    pass
        except (SafetensorError, ValueError) as error:
            size = file.stat().st_size
            raise FileError(f"{file} is damaged or truncated ({size:,} bytes: {error}); {REMEDY}") from error


@contextmanager
def silent() -> Iterator[None]:
    """No progress bars of transformers for a while; its setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
