"""Oracle: the key blocks that hold the most softmax mass, found by computing all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Full
from saccade.methods.base import Scorer


@dataclass(frozen=True)
class Oracle(Scorer):
    """The best blocks there are for a budget: a control, which pays for dense attention and saves nothing.

    No paper: the bound for every method that picks key blocks. All scores are formed, some query blocks at a time, so
    memory grows with the length and not with its square. A block's score is the softmax mass that the rows of the
    query block give it; nothing is forced in. Where a query block starts inside a key block (a chunk at an odd
    offset) and the budget is very small, its first rows may find no key, and their output is 0.

    Args:
        budget: keys that a query block reads: tokens (int) or a share of the keys (float).
        block_q: rows in a query block.
        block_k: slots in a key block.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Blocks [B,H,ceil(N/block_q),K], K = ceil(budget/block_k)

    Departs from the paper: there is none.

    Example:
        >>> q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> k = torch.zeros(1, 1, 192, 2)
        >>> k[0, 0, 70, 0] = 9.0
        >>> Oracle(budget=64).select(q, k, Call.of(q, k)).index.tolist()
        [[[[1]]]]
    """

    unbroken = True
    phases = ("prefill", "decode")
    strictly_causal = False  # the rows of a query block choose together
    chunked = "query blocks start at the chunk's first query, so other rows choose together"

    def score(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        if not call.contiguous:
            raise UnsupportedError("Oracle: needs a store without holes or padding; run such rows one by one")
        B, H, G, N, M = call.shape
        q = q * call.softmax_scale(q.shape[3])
        nk = -(-M // self.block_k)
        found = []
        for a in range(0, N, self.block_q):
            b = min(a + self.block_q, N)
            # keys after the block's last row weigh nothing: half of the work
            end = min(M, call.offset + b) if call.causal else M
            scores = (q[:, :, a:b].reshape(B, G, -1, q.shape[3]) @ k[:, :, :end].transpose(-1, -2)).view(
                B, H, b - a, end
            )
            if call.causal:
                rows = torch.arange(call.offset + a, call.offset + b, device=q.device)
                scores = scores.masked_fill(torch.arange(end, device=q.device) > rows[:, None], float("-inf"))
            mass = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).sum(2)
            mass = torch.nn.functional.pad(mass, (0, nk * self.block_k - end))
            found.append(mass.view(B, H, nk, self.block_k).sum(-1))
        return torch.stack(found, 2)

    def estimate(self, call: Call) -> float:
        return Full().pairs(call)
