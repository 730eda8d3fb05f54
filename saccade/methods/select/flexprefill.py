"""FlexPrefill: each head chooses between its own blocks per query and columns with diagonals, and how many it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Pattern
from saccade.kernels.cover import cover
from saccade.kernels.scores import pool, pooled_scores
from saccade.kernels.select.vertical_slash import column_and_offset_mass
from saccade.kernels.topk import top_blocks
from saccade.methods.base import Selector, check_ints
from saccade.methods.select.xattention import always_read


@dataclass(frozen=True)
class FlexPrefill(Selector):
    """Context-aware sparse prefill (Lai et al. 2025, arXiv 2502.20766, github.com/bytedance/FlexPrefill).

    For the last block of queries the true softmax is compared with one between block means. Where the square root of
    their Jensen-Shannon divergence is below `tau`, means tell the truth, and the head is query-aware: of the whole map
    of mean scores it reads the fewest blocks that hold `gamma` of the mass. Any other head is vertical-slash: it reads
    the fewest block columns and the fewest block diagonals that hold `gamma` of what the last queries look at. So both
    the kind and the amount differ by head and by prompt. The first block and a query block's own are always read.

    Args:
        gamma: share of the estimated mass that is read, above 0 and at most 1.
        tau: divergence, 0 to 1, below which a head is query-aware; 0 = none is.
        least: tokens that the columns and the diagonals of a head cover at least, each.
        block: rows and slots in a block.
        most: key blocks that a query block reads at most, as a share of all; the heaviest stay.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Blocks [B,H,ceil(N/block),K], K = ceil(most * ceil(M/block)), -1 where gamma
        needed fewer

    Departs from the paper: columns and diagonals are counted in blocks, as in the official code, but by the mass of
    blocks, not of tokens; a diagonal that crosses two block diagonals counts for both by its shares. Query-aware heads
    read no diagonals besides. `most` bounds a row, and with it the memory of the lists; 1.0 is the paper.

    Example:
        >>> q, k = torch.ones(1, 1, 512, 1), torch.zeros(1, 1, 512, 1)
        >>> k[0, 0, 70] = 99.0
        >>> FlexPrefill(least=64, block=64, most=1.0).select(q, k, Call.of(q, k)).index[0, 0, 7, :3].tolist()
        [0, 1, 7]
    """

    phases = ("prefill",)
    strictly_causal = False  # the last queries choose for all
    chunked = "each chunk is estimated from its own last queries"
    unbroken = True
    paper = "FlexPrefill, ICLR 2025, arXiv 2502.20766"

    gamma: float = 0.9
    tau: float = 0.1
    least: int = 1024
    block: int = 128
    most: float = 0.25

    def __post_init__(self) -> None:
        check_ints(self, least=1, block=1)
        for name, span in (("gamma", "(0, 1]"), ("most", "(0, 1]"), ("tau", "[0, 1]")):
            value = getattr(self, name)
            fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0
            if not fits or (value == 0 and span[0] == "("):
                raise InputError(f"FlexPrefill: {name} must be in {span}, got {value!r}")

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "FlexPrefill: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        with torch.no_grad():
            column, offset = column_and_offset_mass(q, k, call, self.block)
            column, offset = (t / min(self.block, call.shape.N) for t in (column, offset))
            aware = divergence(q, k, block_sums(column, self.block), call, self.block) < self.tau
            scores = torch.where(
                aware[..., None, None],
                self._query_aware(q, k, call),
                self._vertical_slash(column, offset, call),
            )
            scores = scores.masked_fill(always_read(call, self.block, q.device), float("inf"))
            # a chunk at an odd offset stands in two blocks, and the first comes on top
            count = max(3, math.ceil(scores.shape[3] * self.most - 1e-9))
            return top_blocks(scores, count, self.block, self.block, call)

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        lines, blocks = -(-N // self.block), -(-M // self.block)
        return float(B * H * (min(self.block, N) * M + blocks + lines * blocks))

    def _query_aware(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """Softmax between means; -inf where a block is not among the fewest of the head's whole map."""
        scores = pooled_scores(q, k, self.block, self.block) * call.softmax_scale(q.shape[3])
        starts = torch.arange(scores.shape[3], device=q.device) * self.block
        last = torch.arange(1, scores.shape[2] + 1, device=q.device) * self.block
        future = starts >= (last.clamp(max=call.shape.N) + call.offset)[:, None]
        probs = _softmax(scores.masked_fill(future, float("-inf")), call.shape.M, self.block)
        taken = cover(probs.flatten(2), self.gamma).view(probs.shape)
        return probs.masked_fill(~taken, float("-inf"))

    def _vertical_slash(self, column: Tensor, offset: Tensor, call: Call) -> Tensor:
        """Mass of a block's column and diagonal together; -inf where neither was taken."""
        least = -(-self.least // self.block)
        vertical, slash = block_sums(column, self.block), diagonal_sums(offset, call, self.block)
        columns, diagonals = (cover(t, self.gamma, least=least) for t in (vertical, slash))
        N, M = call.shape.N, call.shape.M
        first = torch.arange(0, N, self.block, device=column.device) + call.offset
        steps = (first + self.block - 1)[:, None] // self.block - torch.arange(
            -(-M // self.block), device=column.device
        )
        steps = steps.clamp_min(0)  # blocks in the future, which nobody reads
        taken = columns[:, :, None] | diagonals[:, :, steps]
        return (vertical[:, :, None] + slash[:, :, steps]).masked_fill(~taken, float("-inf"))


def divergence(q: Tensor, k: Tensor, true: Tensor, call: Call, block: int) -> Tensor:
    """Root of the Jensen-Shannon divergence between the last queries' mass per block and what means say: [B,H]."""
    B, H, G, _, M = call.shape
    mean = q[:, :, -block:].mean(2).view(B, G, H // G, -1) * call.softmax_scale(q.shape[3])
    scores = (mean @ pool(k, block).transpose(-1, -2)).view(B, H, -1)
    guess = _softmax(scores, M, block)
    middle = (true + guess) / 2
    parts = (torch.xlogy(p, p / middle.clamp_min(1e-30)).sum(-1) for p in (true, guess))
    return (sum(parts) / 2).clamp_min(0.0).sqrt()


def block_sums(mass: Tensor, block: int) -> Tensor:
    """[B,H,M] -> [B,H,ceil(M/block)]."""
    return torch.nn.functional.pad(mass, (0, -mass.shape[2] % block)).unflatten(2, (-1, block)).sum(-1)


def diagonal_sums(offset: Tensor, call: Call, block: int) -> Tensor:
    """Mass by how many blocks a key block lies before the block that a query block's first row would end in.

    An offset o of [B,H,M] takes the first rows of a query block one block further back than the others: its mass is
    shared out between the two by the number of rows.
    """
    shift = -call.offset % block
    mass = torch.nn.functional.pad(offset, (shift, -(offset.shape[2] + shift) % block)).unflatten(2, (-1, block))
    back = torch.arange(block, device=offset.device) / block
    near, far = (mass * (1 - back)).sum(-1), (mass * back).sum(-1)
    return torch.nn.functional.pad(near, (0, 1)) + torch.nn.functional.pad(far, (1, 0))


def _softmax(scores: Tensor, length: int, block: int) -> Tensor:
    """Over key blocks, where a short last block counts for what it holds."""
    sizes = (length - torch.arange(scores.shape[-1], device=scores.device) * block).clamp(max=block) / block
    return torch.softmax(scores + sizes.log(), -1, dtype=torch.promote_types(scores.dtype, torch.float32))
