"""MInference: the columns and diagonals that the last queries look at (vertical-slash)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Blocks, Full, Pattern, Tokens, Union
from saccade.methods.base import Selector

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
        K = the most blocks that a head's offsets touch

    Departs from the paper: key blocks are aligned to multiples of `block`, so that a lone offset costs two blocks where
    the paper cuts one at an odd place; every pair on a kept offset is read, the neighbours read for free differ.
    A chunk's offsets are counted from absolute positions.

    Example:
        >>> q = k = torch.zeros(1, 1, 1024, 8)
        >>> call = Call.of(q, k)
        >>> pattern = MInference(columns=30, diagonals=100).select(q, k, call)
        >>> [list(part.index.shape) for part in pattern.parts], round(pattern.density(call), 2)
        ([[1, 1, 16, 3], [1, 1, 1, 30]], 0.34)
    """

    phases = ("prefill",)
    strictly_causal = False  # the last queries choose for all
    chunked = "each chunk is estimated from its own last queries"
    paper = "MInference 1.0, NeurIPS 2024, arXiv 2407.02490"

    columns: int = 1000
    diagonals: int = 6096
    last: int = 64
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("columns", "diagonals", "last", "block"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"MInference: {name} must be an int >= 1, got {value!r}")

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "MInference: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        M = call.shape.M
        if call.shape.N == 1:
            return Full()
        column, offset = column_and_offset_mass(q, k, call, self.last)
        column[..., :SINK] = float("inf")
        offset[..., :NEAR] = float("inf")
        kept = column.topk(min(M, max(self.columns, SINK)), sorted=False).indices
        offsets = offset.topk(min(M, max(self.diagonals, NEAR)), sorted=False).indices
        return Union((diagonal_blocks(offsets, call, self.block), Tokens(kept[:, :, None].int())))

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        return float(B * H * min(self.last, N) * M) if N > 1 else 0.0


def column_and_offset_mass(q: Tensor, k: Tensor, call: Call, last: int) -> tuple[Tensor, Tensor]:
    """Softmax mass of the last queries per key [B,H,M] and per offset i-j [B,H,M]."""
    B, H, G, N, M = call.shape
    L = min(last, N)
    rows = q[:, :, N - L :] * call.softmax_scale(q.shape[3])
    scores = (rows.reshape(B, G, -1, q.shape[3]) @ k.transpose(-1, -2)).view(B, H, L, M)
    future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    scores[..., M - L :].masked_fill_(future, float("-inf"))
    probs = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))
    # keys from last to first, then each row one place further right than the row above: offsets stand in columns
    skewed = torch.nn.functional.pad(probs.flip(-1), (0, L)).flatten(2)[..., : L * (M + L - 1)]
    return probs.sum(2), skewed.reshape(B, H, L, M + L - 1).sum(2)[..., L - 1 :]


def diagonal_blocks(offsets: Tensor, call: Call, block: int) -> Blocks:
    """All blocks that hold a pair (i, j) with i-j among the offsets [B,H,S]; offset 0 must be one of them."""
    N, start = call.shape.N, call.offset
    nq, nk = -(-N // block), -(-call.shape.M // block)
    # an offset lies as many key blocks to the left of every query block: counted from the last row's own key block
    top = (start + block - 1) // block
    low = (start - offsets).div(block, rounding_mode="floor")
    high = (start + block - 1 - offsets).div(block, rounding_mode="floor")
    steps = torch.arange(top - (start - call.shape.M + 1) // block + 1, device=offsets.device)
    none = len(steps)
    met = torch.zeros((*offsets.shape[:2], none), dtype=torch.bool, device=offsets.device)
    met.scatter_(2, top - low, True).scatter_(2, top - high, True)
    # the one place where the host waits: the list is only as long as the head with the most blocks needs
    K = int(met.sum(-1).amax())
    steps = torch.where(met, steps, none).sort(-1).values[..., :K].int()
    index = torch.arange(top, top + nq, dtype=torch.int32, device=offsets.device)[:, None] - steps[:, :, None]
    if top + nq - 1 >= nk:
        # the last query block is short and ends before its first entry begins
        index[:, :, -1] = index[:, :, -1].roll(-1, -1)
        index[:, :, -1, -1] = -1
    return Blocks(index.clamp_min(-1), block, block)
