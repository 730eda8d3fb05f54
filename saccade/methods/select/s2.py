"""S2: a window of blocks, and of what lies before it every s-th block, another one in each head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Blocks, Pattern
from saccade.methods.base import Selector, check_ints


@dataclass(frozen=True)
class S2Attention(Selector):
    """Heterogeneous context sharding (S2-Attention, Lin et al. 2024, arXiv 2407.17678, github.com/linxihui/dkernel).

    The sequence is cut into blocks. A query reads the last `local` blocks up to its own, and of the earlier ones those
    whose number plus `step` times the number of its head is a multiple of `stride`. `stride` heads in a row together
    read everything. Content plays no part, and a block that has left the window unread is never read again. The paper
    trains with this pattern; in a model trained without it, heads that look at single far tokens miss most of them.

    Args:
        block: tokens in a block.
        local: blocks in the window, the query's own included.
        stride: of the blocks before the window, one in so many is read; 1 = dense.
        step: blocks by which the choice of one head differs from the next; with fewer heads than `stride`, the paper
            takes stride // heads.
        share: query heads in a row that read the same blocks; the query heads to a key head, where the cache is to
            profit.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Blocks [1,H,ceil(N/rows),K], K = local + blocks/stride. rows = block, or what
        divides both block and the position of a chunk's first query

    Departs from the paper: heads are query heads by their numbers in the model, in sets of `share`; the paper's are key
    heads. Which heads stay dense a plan says.

    Example:
        >>> q = k = torch.zeros(1, 3, 6, 8)
        >>> index = S2Attention(block=1, local=1, stride=3).select(q, k, Call.of(q, k)).index
        >>> index[0, :, 5].tolist()
        [[5, 3, 0], [5, 2, -1], [5, 4, 1]]
    """

    phases = ("prefill", "decode")
    unbroken = True
    paper = "S2-Attention, 2024, arXiv 2407.17678"

    block: int = 64
    local: int = 16
    stride: int = 16
    step: int = 1
    share: int = 1

    def __post_init__(self) -> None:
        check_ints(self, block=1, local=1, stride=1, step=1, share=1)

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "S2Attention: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        N, M = call.shape.N, call.shape.M
        # rows of a query block must stand in one block of the sequence, wherever a chunk begins
        rows = math.gcd(call.offset, self.block)
        lines, blocks = -(-N // rows), -(-M // self.block)
        local = min(self.local, blocks)
        own = (torch.arange(lines, device=q.device) * rows + call.offset) // self.block
        near = own[:, None] - torch.arange(local, device=q.device)

        first = torch.remainder(-(head_numbers(call, q.device) // self.share) * self.step, self.stride)
        last = (own - self.local - first[:, None]).div(self.stride, rounding_mode="floor")  # [H, lines]
        count = torch.arange(max(0, (blocks - 1 - self.local) // self.stride + 1), device=q.device)
        turn = last[..., None] - count
        far = torch.where(turn >= 0, turn * self.stride + first[:, None, None], -1)
        index = torch.cat((near.expand(len(first), -1, -1), far), -1)
        return Blocks(index.clamp_min(-1).int()[None], rows, self.block)


def head_numbers(call: Call, device: torch.device) -> Tensor:
    """The numbers in the model of a call's query heads."""
    low = call.heads[0]
    if call.heads == tuple(range(low, low + len(call.heads))):
        # made where it is used: the host would wait for a list that is sent there
        return torch.arange(low, low + len(call.heads), device=device)
    return torch.tensor(call.heads, device=device)
