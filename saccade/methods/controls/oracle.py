"""Oracle: the key blocks that hold the most softmax mass, found by computing all of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Full
from saccade.kernels.select.block_mass import block_mass
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
        >>> import torch
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
        return block_mass(q, k, call, self.block_q, self.block_k)

    def estimate(self, call: Call) -> float:
        return Full().pairs(call)
