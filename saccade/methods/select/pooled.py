"""Pooled: the key blocks whose mean answers best to the mean of a query block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Pattern
from saccade.kernels.scores import pooled_scores
from saccade.kernels.topk import top_pooled
from saccade.methods.base import Scorer, budget_tokens


@dataclass(frozen=True)
class Pooled(Scorer):
    """MInference's block-sparse pattern (Jiang et al. 2024, arXiv 2407.02490, github.com/microsoft/MInference).

    Queries and keys are averaged in blocks; each query block reads the key blocks whose mean has the largest product
    with its own. Neither the diagonal nor the first block is forced in. Only the ranking matters, so products are not
    scaled.

    Args:
        budget: keys that a query block reads: tokens (int) or a share of the keys (float).
        block_q: rows in a query block.
        block_k: slots in a key block.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Blocks [B,H,ceil(N/block_q),K], K = ceil(budget/block_k)

    Departs from the paper: a short last block is the mean of what it holds, not of zeros too. Where a query block
    starts inside a key block (a chunk at an odd offset), that key block is forced in, so that no row is without a key.

    Example:
        >>> q, k = torch.ones(1, 1, 192, 1), torch.ones(1, 1, 192, 1)
        >>> k[0, 0, :64] = 5.0
        >>> Pooled(budget=64).select(q, k, Call.of(q, k)).index.flatten().tolist()
        [0, 0, 0]
    """

    phases = ("prefill",)
    strictly_causal = False  # a query block's mean, and that of its own key block, hold later tokens
    chunked = "query blocks start at the chunk's first query, and keys that come later are not yet averaged"
    unbroken = True
    paper = "MInference 1.0, NeurIPS 2024, arXiv 2407.02490"

    budget: int | float = 6400

    def score(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        if not call.contiguous:
            raise UnsupportedError("Pooled: needs a store without holes or padding; run such rows one by one")
        scores = pooled_scores(q, k, self.block_q, self.block_k)
        if not call.causal:
            return scores
        own, end = self._forced(call, q.device)
        at = torch.arange(scores.shape[3], device=q.device)
        return scores.masked_fill((at >= own[:, None]) & (at < end[:, None]), float("inf"))

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        """The top blocks of `score`, which at a million tokens is too large to be held."""
        if not call.contiguous:
            raise UnsupportedError("Pooled: needs a store without holes or padding; run such rows one by one")
        count = -(-budget_tokens(self.budget, call.shape.M) // self.block_k)
        forced = self._forced(call, q.device) if call.causal else None
        return top_pooled(q, k, count, self.block_q, self.block_k, call, forced=forced)

    def _forced(self, call: Call, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first row's key block where rows behind it have later ones: [own, own + 1), else nothing, [own, own)."""
        first = torch.arange(0, call.shape.N, self.block_q, dtype=torch.int32, device=device) + call.offset
        last = (first + self.block_q).clamp(max=call.shape.M) - 1
        own = first // self.block_k
        # a query block over several key blocks could pick only one that starts after its first row
        return own, own + (own < last // self.block_k).int()

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        return float(B * H * -(-N // self.block_q) * -(-M // self.block_k))
