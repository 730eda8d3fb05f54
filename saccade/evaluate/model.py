"""A model and its tokenizer from a folder, or the bundled reader. Never from the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saccade import reader
from saccade.core.errors import FileError, InputError
from saccade.core.plan import ModelShape

READER = "reader"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer.

    Args:
        name: what it was asked for as: "reader", a folder, or a name in the local cache of the hub.
        model: a causal language model of transformers, in evaluation, with sdpa attention.
        tokenizer: its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def shape(self) -> ModelShape:
        """Layers and heads, as plans see them."""
        return ModelShape.of(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> str:
        """The weights' type in short: "float32"."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    @property
    def trained_length(self) -> int | None:
        """Tokens of the longest sequence that the model was trained for, as its config says."""
        config = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(config, "max_position_embeddings", None)

    def beyond(self, length: int) -> str | None:
        """A warning for prompts longer than the model was trained for, or None."""
        if self.trained_length is None or length <= self.trained_length:
            return None
        return (
            f"{length} tokens are more than the {self.trained_length} that {self.name} was trained for: "
            "answers far back may fail whatever the method"
        )


def load(name: str = READER, dtype: str | None = None, device: str | None = None) -> Loaded:
    """Load a model for evaluation.

    Args:
        name: "reader" for the bundled one, else a folder with config, weights and tokenizer.
        dtype: "float32", "bfloat16" or "float16"; None = float32 on a CPU, bfloat16 elsewhere.
        device: "cpu", "cuda", ...; None = cuda where there is one.

    Raises:
        FileError: there is no readable model of this name.
        InputError: a dtype or device that does not exist here.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = torch.device(check_device(device))
    dtype = dtype or ("float32" if place.type == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if name == READER:
        return Loaded(name, *reader.load(DTYPES[dtype], str(place)))
    if not name or (not Path(name).exists() and name.startswith(("/", ".", "~"))):
        raise FileError(f"{name or repr(name)}: there is no such folder; give a model's folder, or {READER}")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileError(f"{name}: a folder without config.json, so not a model")
    try:
        # loaders raise whatever the broken file makes them raise
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES[dtype], local_files_only=True, attn_implementation="sdpa"
        )
    except Exception as error:
        said = str(error).strip().split("\n")[0][:300]
        raise FileError(f"{name}: no model could be read there ({type(error).__name__}: {said})") from error
    return Loaded(name, model.to(place).eval(), tokenizer)


def check_device(name: str | None) -> str:
    """A device name that works here; None = the best one.

    Raises:
        InputError: unknown, or CUDA is asked for and not there.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; known are cpu, cuda, cuda:0, ...")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: this machine or this build of torch has no CUDA")
    return name
