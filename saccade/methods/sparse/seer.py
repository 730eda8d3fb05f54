"""SeerAttention: a small gate, trained on the model's own attention, picks the key blocks of each query block."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import FileError, InputError, UnsupportedError
from saccade.core.pattern import Blocks, Full, Pattern
from saccade.core.rope import Rope
from saccade.kernels.scores import pool, pool_bounds, products
from saccade.kernels.topk import top_blocks
from saccade.methods.base import Selector, Weights, budget_tokens, check_budget

VERSION = "1"
INSIDE = "saccade:"  # a path that starts so is one within the package
PACKAGE = Path(__file__).parents[2]
TILE = 1 << 22  # scores held at a time
ROWS = 1 << 13  # tokens that are turned back at a time
REMEDY = "saccade.fit.seer.fit_gate trains one for a model and saves it"


@dataclass(frozen=True)
class Seer(Selector):
    """SeerAttention's gate in prefill (Gao et al. 2024, arXiv 2410.13276; official code microsoft/SeerAttention).

    Unrotated queries are averaged in blocks; of unrotated keys each block gives its largest and smallest values and
    its mean, which one trained matrix per query head turns into a key of the gate. Both are rotated to the place of
    their block's first token, and each query block reads the key blocks with the largest products. Decoding is dense.

    Args:
        weights: path of a gate file, from `saccade.fit.seer.fit_gate` (a relative one starts in the current folder;
            "saccade:" in front stands for the package's). The file says how many tokens a block has.
        budget: keys that a query block reads: tokens (int) or a share of the keys (float).
        tail: query blocks at the end of a call that read everything.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Blocks [B,H,ceil(N/block),K], K = ceil(budget/block), or all blocks with a tail

    Departs from the paper: the key blocks that hold a query block's own tokens are always read and count in the
        budget. The budget is a share of the keys; the paper's density r of the causal half is 1 - sqrt(1 - r) of them,
        rounded down. The gate is as wide as the head, so that queries need no matrix. The threshold on the gate's
        softmax, which makes every row's count its own, is not here.

    Raises:
        InputError: no weights, or those of another model.
        FileError: a file that is missing, cut off or no gate.
        UnsupportedError: a model whose rotary positions are not known, or a store with holes.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> q, k = torch.randn(1, 4, 600, 8), torch.randn(1, 2, 600, 8)
        >>> call = Call.of(q, k, rope=Rope(torch.rand(4)))
        >>> with TemporaryDirectory() as folder:
        ...     save_gate(f"{folder}/gate.safetensors", [torch.randn(4, 24, 8)], block=32)
        ...     seer = Seer(f"{folder}/gate.safetensors", budget=64, tail=0)
        ...     pattern = seer.select(q, k, call)
        >>> pattern.index.shape, pattern.index[0, 0, :2].tolist()
        (torch.Size([1, 4, 19, 2]), [[0, -1], [0, 1]])
    """

    phases = ("prefill",)
    strictly_causal = False  # a query block's mean, and the features of its own key block, hold later tokens
    chunked = "query blocks start at the chunk's first query, and keys that come later are not yet in their block"
    full_steps = True
    trained = True
    paper = "SeerAttention, NeurIPS 2025, arXiv 2410.13276"

    weights: str | None = None
    budget: int | float = 0.1
    tail: int = 2

    def __post_init__(self) -> None:
        check_budget("Seer", self.budget)
        if isinstance(self.tail, bool) or not isinstance(self.tail, int) or self.tail < 0:
            raise InputError(f"Seer: tail must be an int >= 0, got {self.tail!r}")
        if self.weights is None:
            raise InputError(f"Seer: needs trained weights, give the path of a gate file; {REMEDY}")
        if not isinstance(self.weights, str):
            raise InputError(f"Seer: weights must be a path (str), got {self.weights!r}")
        # a plan that names a bad file is refused before anything runs
        _ = self.gate

    @property
    def gate(self) -> Gate:
        """What the file says of itself."""
        assert self.weights is not None
        return _header(*_stamp(self.weights))

    @property
    def weights_for(self) -> Weights:
        gate = self.gate
        return Weights(gate.layers, gate.heads, gate.width)

    @property
    def block_k(self) -> int:
        """Tokens of a block, of queries as of keys."""
        return self.gate.block

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        gate, rope = self._check(q, call), call.rope
        assert rope is not None and self.weights is not None
        block, (_, _, _, N, M) = gate.block, call.shape
        nq, nk = -(-N // block), -(-M // block)
        if self.tail >= nq:
            return Full()
        # a choice has no gradient
        weight = _matrices(*_stamp(self.weights), call.layer, q.device)[list(call.heads)]
        asked = gate_queries(q.detach(), call.offset, block, rope)
        keys = gate_keys(key_features(k.detach(), block, rope), weight, block, rope)
        count, lines = -(-budget_tokens(self.budget, M) // block), []
        width = nk if self.tail else min(count, nk)
        step = max(1, TILE // (call.shape.B * call.shape.H * nk))
        for a in range(0, nq - self.tail, step):
            b = min(a + step, nq - self.tail)
            rows, seen = min(b * block, N), call.offset + min(b * block, N)
            part = replace(call, shape=call.shape._replace(N=rows - a * block, M=seen))
            m = -(-seen // block)
            scores = gate_scores(asked[:, :, a:b], keys[:, :, :m])
            first = torch.arange(a, b, device=q.device) * block + call.offset
            at, last = torch.arange(m, device=q.device), (first + block).clamp(max=seen) - 1
            # without its own tokens a query block could be left with blocks that start after its first row
            own = (at >= (first // block)[:, None]) & (at <= (last // block)[:, None])
            index = top_blocks(scores.masked_fill(own, float("inf")), count, block, block, part).index
            lines.append(torch.nn.functional.pad(index, (0, width - index.shape[3]), value=-1))
        if self.tail:
            at = torch.arange(nk, dtype=torch.int32, device=q.device)
            last = (torch.arange(nq - self.tail + 1, nq + 1, device=q.device) * block).clamp(max=N) + call.offset
            lines.append(torch.where(at * block < last[:, None], at, -1).expand(*q.shape[:2], -1, -1))
        return Blocks(torch.cat(lines, 2), block, block)

    def estimate(self, call: Call) -> float:
        """Products of blocks, and the matrix: three products of a head's width for each of its features."""
        B, H, _, N, M = call.shape
        gate = self.gate
        nq = -(-N // gate.block)
        if self.tail >= nq:
            return 0.0
        return float(B * H * -(-M // gate.block) * (nq - self.tail + 3 * gate.width))

    def _check(self, q: Tensor, call: Call) -> Gate:
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "Seer: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        if call.rope is None:
            raise UnsupportedError("Seer: its gate looks at unrotated keys, but how this model rotates is not known")
        gate = self.gate
        if call.layer >= gate.layers or max(call.heads) >= gate.heads or q.shape[3] != gate.width:
            raise InputError(
                f"Seer: {self.weights} is for {gate.layers} layers and {gate.heads} query heads of width {gate.width}, "
                f"this is layer {call.layer}, head {max(call.heads)}, width {q.shape[3]}: another model's; {REMEDY}"
            )
        return gate


class Gate(NamedTuple):
    """A gate file's sizes: tokens of a block, layers, query heads and head width of the model."""

    block: int
    layers: int
    heads: int
    width: int


def gate_queries(q: Tensor, first: int, block: int, rope: Rope) -> Tensor:
    """Means of unrotated queries, rotated to their block's first position: [B,H,N,D] -> [B,H,ceil(N/block),D].

    `first` is the position of the first query.
    """
    mean = torch.cat([pool(t, block) for t in _unrotated(q, first, block, rope)], 2)
    return rope(mean, torch.arange(mean.shape[2], device=q.device) * block + first)


def key_features(k: Tensor, block: int, rope: Rope) -> Tensor:
    """Largest, smallest and mean values of unrotated keys from position 0 on: [B,G,M,D] -> [B,G,ceil(M/block),3D]."""
    parts = []
    for t in _unrotated(k, 0, block, rope):
        low, high = pool_bounds(t, block)
        parts.append(torch.cat((high, low, pool(t, block)), 3))
    return torch.cat(parts, 2)


def gate_keys(features: Tensor, weight: Tensor, block: int, rope: Rope) -> Tensor:
    """The gate's keys: features [B,G,n,3D], weight [H,3D,D] -> [B,H,n,D]."""
    B, G, n, _ = features.shape
    H = weight.shape[0]
    shared = weight.to(features.dtype).unflatten(0, (G, H // G))
    keys = torch.einsum("bgnf,gsfd->bgsnd", features, shared).reshape(B, H, n, -1)
    return rope(keys, torch.arange(n, device=features.device) * block)


def gate_scores(asked: Tensor, keys: Tensor) -> Tensor:
    """What the gate says of each pair of blocks: [B,H,nq,D], [B,H,nk,D] -> [B,H,nq,nk]."""
    return products(asked, keys) * asked.shape[3] ** -0.5


def _unrotated(x: Tensor, first: int, block: int, rope: Rope) -> list[Tensor]:
    """Rows in float32 or wider, as they were before rotation, in pieces of whole blocks."""
    step = max(1, ROWS // block) * block
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).split(step, 2)
    return [
        rope(t, torch.arange(t.shape[2], device=x.device) + (first + i * step), inverse=True)
        for i, t in enumerate(wide)
    ]


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


def _stamp(path: str) -> tuple[str, int, int]:
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
def _header(path: str, changed: int, size: int) -> Gate:
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
def _matrices(path: str, changed: int, size: int, layer: int, device: torch.device) -> Tensor:
    """One layer's matrices [H,3D,D] in float32."""
    try:
        with safe_open(path, "pt") as file:
            weight = file.get_tensor(_name(layer)).to(device, torch.float32, copy=True)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"Seer: {path} is damaged ({size:,} bytes: {error}); {REMEDY}") from None
    if not math.isfinite(float(weight.abs().sum())):
        raise FileError(f"Seer: {path}: {_name(layer)} holds numbers that are not finite; {REMEDY}")
    return weight
