"""Costs: bytes that a decoding step reads, peak memory, and the arithmetic bound of a prefill's speed-up.

All three are counted or measured apart from time, so that a timing can be held against them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.errors import UnsupportedError
from saccade.evaluate.model import Loaded
from saccade.hf.meter import Meter
from saccade.methods.apply import Seen


def read_bytes(seen: Seen) -> float:
    """Bytes of keys, values and summaries that one attend of a few queries reads at least; NaN if unknown.

    A slot that any query of a key head's group reads counts once, its key and its value. What was scored to choose
    counts a row of a key's width for each pair, once for the query heads that share a key head, in the type of the
    keys. A method that gives the answer itself is taken to read key and value for every other pair that it scores.

    Args:
        seen: what was looked at; its pattern becomes a mask of all its queries and keys.
    """
    return float(bytes_of(seen, None if seen.pattern is None else seen.pattern.mask(seen.call)))


def bytes_of(seen: Seen, mask: Tensor | None) -> Tensor | float:
    """`read_bytes`, from the pattern's mask [B,H,N,M], as a number that may still be on the device: float64."""
    B, H, G, N, M = seen.call.shape
    key, value = (t.shape[3] * t.element_size() for t in (seen.k, seen.v))
    share = H // G
    if mask is None:
        return (seen.estimate * (key + value) - seen.scored * value) / share
    slots = mask.reshape(B, G, share * N, M).any(2).sum().double()
    return slots * (key + value) + seen.estimate / share * key


@dataclass
class Peak:
    """Bytes of the largest allocation above what was held before; None on a CPU."""

    bytes: int | None = None


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of a block, above what is allocated when it begins (weights, most of all)."""
    found = Peak()
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    torch.cuda.synchronize(device)
    found.bytes = torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class Work:
    """The floating point operations of a model's prefill, a multiplication and an addition each as one.

    Args:
        token: of one token in all layers outside of attention: 2 for each weight of projections and MLPs.
        head: of the last token's logits: 2 for each weight of the output head.
        pair: of one (query, key) pair of one head, 2 (D + Dv): its score and its part of the answer.
        score: of one pair that is only scored, 2 D.
        heads: query heads in all layers that attend to everything before.
    """

    token: float
    head: float
    pair: float
    score: float
    heads: int

    def prefill(self, tokens: int, read: float = 1.0, estimate: float = 0.0) -> float:
        """Operations of a prefill of N tokens: N token + head + heads N (N + 1) / 2 (read pair + estimate score).

        Args:
            tokens: of the prompt.
            read: share of the causal pairs that is attended to.
            estimate: share of the causal pairs that is scored to choose them.

        Example:
            >>> Work(token=100.0, head=0.0, pair=4.0, score=2.0, heads=1).prefill(9, read=0.5, estimate=0.1)
            999.0
        """
        pairs = self.heads * tokens * (tokens + 1) / 2
        return tokens * self.token + self.head + pairs * (read * self.pair + estimate * self.score)

    def ceiling(self, tokens: int, read: float, estimate: float) -> float:
        """The speed-up of a prefill if every operation took equal time: dense operations over those that are left."""
        return self.prefill(tokens) / self.prefill(tokens, read, estimate)


def work_of(loaded: Loaded, widths: tuple[int, int], layers: int | None = None) -> Work:
    """Count a model's operations from the weights of its linear modules.

    Args:
        loaded: the model; all its `nn.Linear` but the output head belong to every token.
        widths: of a head's keys and values.
        layers: with attention to everything before; None = all.

    Raises:
        UnsupportedError: a model with experts, of which a token uses a few only.
    """
    model: Any = loaded.model
    config = model.config.get_text_config()
    experts = [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(config, name, None)]
    if experts:
        raise UnsupportedError(f"work_of: {type(model).__name__} has experts ({experts[0]}); its operations vary")
    out = model.get_output_embeddings()
    body = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not out)
    last = 0 if out is None else out.weight.numel()
    count = loaded.shape.layers if layers is None else layers
    D, Dv = widths
    return Work(2.0 * body, 2.0 * last, 2.0 * (D + Dv), 2.0 * D, count * loaded.shape.heads)


def ceiling(loaded: Loaded, tokens: int, widths: tuple[int, int], meter: Meter) -> float | None:
    """The arithmetic bound of a watched prefill's speed-up; None for models with experts, or if nothing was seen."""
    mine = {at: layer for (phase, at), layer in meter.layers.items() if phase == "prefill"}
    allowed = sum(layer.allowed for layer in mine.values())
    if not allowed:
        return None
    read = sum(layer.pairs + layer.whole for layer in mine.values()) / allowed
    estimate = sum(layer.estimate for layer in mine.values()) / allowed
    try:
        found = work_of(loaded, widths, len(mine)).ceiling(tokens, read, estimate)
    except UnsupportedError:
        return None
    return None if math.isnan(found) else found
