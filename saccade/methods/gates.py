"""Gate files: the trained weights of a block gate, as safetensors, checked before anything is built of them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saccade.core.errors import FileError, InputError

VERSION = "1"
INSIDE = "saccade:"  # a path that starts so is one within the package
PACKAGE = Path(__file__).parents[1]
REMEDY = "saccade.fit.seer.fit_gate trains one for a model and saves it"


class Gate(NamedTuple):
    """A gate file's sizes: tokens of a block, layers, query heads and head width of the model."""

    block: int
    layers: int
    heads: int
    width: int


def save_gate(path: str | os.PathLike[str], weights: Sequence[Tensor], block: int) -> None:
    """Write a gate file; it is whole or not there.

    A gate file is a safetensors file with one tensor for each layer, `layers.0.key` and so on, that maps a key block's
    features (largest, smallest, mean) to a key, and the sizes in its metadata.

    Args:
        path: where to.
        weights: a matrix per query head, [H, 3D, D], for each layer.
        block: tokens of a block.

    Raises:
        InputError: weights that are no gate.
        FileError: no such folder.
    """
    shapes = {tuple(w.shape) for w in weights}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 3 or shape[1] != 3 * shape[2] or 0 in shape or block < 1:
        raise InputError(f"save_gate: needs [heads, 3 * width, width] for each layer, got {sorted(shapes)}")
    sizes = Gate(block, len(weights), shape[0], shape[2])
    metadata = {"saccade_gate": VERSION, **{name: str(value) for name, value in sizes._asdict().items()}}
    tensors = {_name(i): w.detach().cpu().contiguous().clone() for i, w in enumerate(weights)}
    target = Path(path)
    if not target.parent.is_dir():
        raise FileError(f"save_gate: there is no folder {str(target.parent)!r}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gate-") as folder:
        whole = Path(folder) / target.name
        save_file(tensors, whole, metadata)
        os.replace(whole, target)


def _name(layer: int) -> str:
    return f"layers.{layer}.key"


def stamp(path: str) -> tuple[str, int, int]:
    """A file as it is now: path, time of its last change, bytes."""
    place = PACKAGE / path.removeprefix(INSIDE) if path.startswith(INSIDE) else Path(path)
    try:
        found = place.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"Seer: the gate file {str(place)!r} cannot be read ({reason}); {REMEDY}") from None
    if not place.is_file():
        raise FileError(f"Seer: the gate file {str(place)!r} is not a file; {REMEDY}")
    return str(place), found.st_mtime_ns, found.st_size


@lru_cache(maxsize=64)
def header(path: str, changed: int, size: int) -> Gate:
    """The sizes, after a look at the names, shapes and types of all tensors."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"Seer: {path} is damaged or no safetensors file ({size:,} bytes: {error}); {REMEDY}") from None
    if "saccade_gate" not in metadata:
        raise FileError(f"Seer: {path} is not a gate file (its metadata has no 'saccade_gate'); {REMEDY}")
    if metadata["saccade_gate"] != VERSION:
        raise FileError(f"Seer: {path} is of version {metadata['saccade_gate'][:20]!r}, this saccade reads {VERSION}")
    gate = Gate(*(_size(metadata, name, path) for name in Gate._fields))
    expected = {_name(i) for i in range(gate.layers)}
    if set(tensors) != expected:
        wrong = sorted(set(tensors) ^ expected)
        raise FileError(f"Seer: {path} should have {gate.layers} layers; missing or unknown: {wrong[:4]}")
    for name, (shape, kind) in tensors.items():
        if shape != (gate.heads, 3 * gate.width, gate.width) or kind not in ("F32", "BF16", "F16"):
            raise FileError(
                f"Seer: {path}: {name} should be {gate.heads} x {3 * gate.width} x {gate.width} in float32, bfloat16 "
                f"or float16, got {' x '.join(map(str, shape))} in {kind}"
            )
    return gate


def _size(metadata: dict[str, Any], name: str, path: str) -> int:
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) > 0):
        raise FileError(f"Seer: {path}: {name} in its metadata must be 1 to 99999, got {text[:20]!r}")
    return int(text)


@lru_cache(maxsize=256)
def matrices(path: str, changed: int, size: int, layer: int, device: torch.device) -> Tensor:
    """One layer's matrices [H,3D,D] in float32."""
    try:
        with safe_open(path, "pt") as file:
            weight = file.get_tensor(_name(layer)).to(device, torch.float32, copy=True)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"Seer: {path} is damaged ({size:,} bytes: {error}); {REMEDY}") from None
    if not math.isfinite(float(weight.abs().sum())):
        raise FileError(f"Seer: {path}: {_name(layer)} holds numbers that are not finite; {REMEDY}")
    return weight
