"""MInference: the columns and diagonals that the last queries look at (vertical-slash)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Full, Pattern, Tokens, Union
from saccade.kernels.select.vertical_slash import column_and_offset_mass, diagonal_blocks
from saccade.kernels.topk import largest
from saccade.methods.base import Selector, check_ints

SINK, NEAR = 30, 100  # columns and offsets that are always read


@dataclass(frozen=True)
class MInference(Selector):
    """The vertical-slash pattern of MInference (Jiang et al. 2024, arXiv 2407.02490, github.com/microsoft/MInference).

    The softmax of the last queries is summed along columns (keys) and along diagonals (offsets between query and key).
    The heaviest columns are read by all later queries, the heaviest offsets by every query, in blocks. The first 30
    columns and the nearest 100 offsets are always among them. The paper's other two patterns are the methods
    `streaming` (A-shape) and `pooled` (block-sparse); a plan says which head runs which, and `saccade.fit` finds out.

    Args:
        columns: keys read by all queries.
        diagonals: offsets read by every query.
        last: queries at the end that the estimate is made from.
        block: rows and slots in a block.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Union of Blocks [B,H,ceil(N/block),K] and Tokens [B,H,1,columns],
        K = the most blocks that a head's offsets touch, on a GPU the most that they could touch

    Departs from the paper: key blocks are aligned to multiples of `block`, so that a lone offset costs two blocks where
    the paper cuts one at an odd place; every pair on a kept offset is read, the neighbours read for free differ.
    A chunk's offsets are counted from absolute positions.

    Example:
        >>> import torch
        >>> q = k = torch.zeros(1, 1, 1024, 8)
        >>> call = Call.of(q, k)
        >>> pattern = MInference(columns=30, diagonals=100).select(q, k, call)
        >>> [list(part.index.shape) for part in pattern.parts], round(pattern.density(call), 2)
        ([[1, 1, 16, 3], [1, 1, 1, 30]], 0.34)
    """

    phases = ("prefill",)
    strictly_causal = False  # the last queries choose for all
    chunked = "each chunk is estimated from its own last queries"
    unbroken = True
    paper = "MInference 1.0, NeurIPS 2024, arXiv 2407.02490"

    columns: int = 1000
    diagonals: int = 6096
    last: int = 64
    block: int = 64

    def __post_init__(self) -> None:
        check_ints(self, columns=1, diagonals=1, last=1, block=1)

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "MInference: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        if call.shape.N == 1:
            return Full()
        column, offset = column_and_offset_mass(q.detach(), k.detach(), call, self.last)
        column[..., :SINK] = float("inf")
        offset[..., :NEAR] = float("inf")
        kept, offsets = largest(column, max(self.columns, SINK)), largest(offset, max(self.diagonals, NEAR))
        return Union((diagonal_blocks(offsets, call, self.block), Tokens(kept[:, :, None])))

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        return float(B * H * min(self.last, N) * M) if N > 1 else 0.0
