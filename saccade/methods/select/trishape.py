"""TriShape: sinks, a window, and last queries that read everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Blocks, Full, Pattern, Union, Window
from saccade.methods.base import Selector, check_ints

BLOCK = 64


@dataclass(frozen=True)
class TriShape(Selector):
    """Tri-shape attention (SCBench, Li et al. 2024, arXiv 2412.10319, github.com/microsoft/MInference).

    Query i reads the first `sink` positions and the last `recent` up to its own, as in `streaming`. The last `last`
    queries of the call, where a question usually stands, read everything before them.

    Args:
        sink: positions from the start of the sequence.
        recent: positions that end at the query, itself included.
        last: queries at the end that read everything.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Union of a Window and Blocks [1,1,ceil(N/64),ceil(M/64)] that are empty but for the
        last queries

    Departs from the paper: the last queries come in whole blocks of 64 rows, so up to 63 rows more read everything.

    Example:
        >>> q = k = torch.zeros(1, 1, 256, 8)
        >>> call = Call.of(q, k)
        >>> mask = TriShape(sink=1, recent=2, last=64).select(q, k, call).mask(call)
        >>> mask[0, 0].sum(-1)[[100, 191, 192, 255]].tolist()
        [3, 3, 193, 256]
    """

    phases = ("prefill",)
    strictly_causal = False  # how many queries follow decides which are the last
    chunked = "the last queries of every chunk read everything"
    unbroken = True
    paper = "SCBench, ICLR 2025, arXiv 2412.10319"

    sink: int = 128
    recent: int = 3968
    last: int = 100

    def __post_init__(self) -> None:
        check_ints(self, sink=0, recent=1, last=1)

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if not call.contiguous:
            raise UnsupportedError("TriShape: needs a store without holes or padding; run such rows one by one")
        N, M = call.shape.N, call.shape.M
        first = (N - self.last) // BLOCK
        if first <= 0:
            return Full()
        index = torch.full((1, 1, -(-N // BLOCK), -(-M // BLOCK)), -1, dtype=torch.int32, device=q.device)
        index[:, :, first:] = torch.arange(index.shape[3], dtype=torch.int32, device=q.device)
        return Union((Window(self.sink, self.recent), Blocks(index, BLOCK, BLOCK)))
