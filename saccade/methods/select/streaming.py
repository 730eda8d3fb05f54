"""Streaming: the first tokens and the most recent ones (A-shape)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Pattern, Window
from saccade.methods.base import Selector, check_ints


@dataclass(frozen=True)
class Streaming(Selector):
    """Attention to sinks and a sliding window (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453;
    as "A-shape" in MInference, arXiv 2407.02490, github.com/microsoft/MInference).

    Query i reads the first `sink` positions and the last `recent` up to its own. Content plays no part, so nothing is
    estimated. It saves computation; the cache keeps all tokens (a CachePolicy drops them).

    Args:
        sink: positions from the start of the sequence.
        recent: positions that end at the query, itself included.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Window

    Departs from the paper: keys keep their own positions, as in MInference; StreamingLLM counts positions inside the
    cache.

    Example:
        >>> import torch
        >>> q = k = torch.zeros(1, 1, 7, 8)
        >>> Streaming(sink=2, recent=3).select(q, k, Call.of(q, k)).mask(Call.of(q, k))[0, 0, 6].int().tolist()
        [1, 1, 0, 0, 1, 1, 1]
    """

    phases = ("prefill", "decode")
    paper = "StreamingLLM, ICLR 2024, arXiv 2309.17453"

    sink: int = 128
    recent: int = 3968

    def __post_init__(self) -> None:
        check_ints(self, sink=0, recent=1)

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        return Window(self.sink, self.recent)
