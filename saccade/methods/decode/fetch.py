"""Fetch: of what was moved out of the store, only the blocks whose keys can answer best are brought near."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.cache.far import Far, chosen, everything, expect, far_of
from saccade.core.call import Call
from saccade.core.pattern import Full, Pattern
from saccade.kernels.attend import attend
from saccade.kernels.merge import Out, merge
from saccade.kernels.scores import pool_bounds, products
from saccade.kernels.topk import largest
from saccade.methods.apply import phase_of
from saccade.methods.base import Selector, check_ints


@dataclass(frozen=True)
class FetchBlocks(Selector):
    """Decoding over a tier of host memory by block, chosen as Quest chooses pages (Tang et al., ICML 2024,
    arXiv 2406.10774, github.com/mit-han-lab/Quest).

    Goes with `offload` (phase "cache") for the same heads. Of each far block the smallest and largest value of every
    feature stay on the device; they bound what any of its keys can score. A query reads all that the store holds and
    the `blocks` far blocks with the largest bounds, which come through the block cache: what the last steps read is
    mostly there already. Query heads that share a key head read the same blocks. While nothing is far it is dense.

    Args:
        blocks: far blocks that a query reads, of `offload`'s size.

    Shapes:
        q [B,H,N,D], k [B,G,M,D], v [B,G,M,Dv] -> Out(o [B,H,N,Dv], lse [B,H,N])

    Departs from the paper: pages live in host memory; the heads of a group choose together, by the largest share of
    any of them (softmax over the bounds), so that a block moves once for all; first and newest tokens are always read.

    Example:
        >>> q = torch.ones(1, 1, 1, 4)
        >>> FetchBlocks(blocks=4).select(q, q, Call.of(q, q))
        Full()
    """

    phases = ("decode",)
    reads_far = True
    grouped = True
    separate = False
    paper = "Quest, ICML 2024, arXiv 2406.10774"

    blocks: int = 64

    def __post_init__(self) -> None:
        check_ints(self, blocks=1)

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        return Full()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Out:
        far = far_of(call)
        if far is None:
            return attend(q, k, v, None, call)
        N, held = call.shape.N, far.tier.blocks
        if phase_of(N, call.shape.M) == "prefill" or held <= self.blocks:
            return merge([attend(q, k, v, None, call), everything(q, far, call)])
        index = self._chosen(q, far, call)
        expect(index[:, :, 0], far, call)
        near = attend(q, k, v, None, call)
        parts = [chosen(q[:, :, i : i + 1], index[:, :, i], far, _only(call, i)) for i in range(N)]
        lse = torch.cat([part.lse for part in parts if part.lse is not None], 2)
        return merge([near, Out(torch.cat([part.o for part in parts], 2), lse)])

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        far = far_of(call)
        if far is None:
            return 0.0
        dense = phase_of(N, M) == "prefill" or far.tier.blocks <= self.blocks
        read = far.tier.tokens if dense else self.blocks * far.tier.block + 2 * far.tier.blocks
        return float(B * H * N * (M + read))

    def _chosen(self, q: Tensor, far: Far, call: Call) -> Tensor:
        """Blocks of each key head and query, in host memory [B,G,N,blocks]."""
        B, H, G, N, _ = call.shape
        scores = products(torch.cat((q.clamp_max(0), q.clamp_min(0)), -1), _bounds(far, q, call))
        scores = (scores * call.softmax_scale(q.shape[3])).log_softmax(-1).view(B, G, H // G, N, -1).amax(2)
        return largest(scores, self.blocks).cpu()


def _bounds(far: Far, q: Tensor, call: Call) -> Tensor:
    """Smallest and largest of each feature in each far block [B,G,blocks,2D]; those of new blocks are added."""
    held: dict[str, Any] = call.memory.setdefault(f"fetch {call.heads}", {})
    rows: Tensor | None = held.get("rows")
    first = 0 if rows is None else rows.shape[2]
    if first < far.tier.blocks:
        block = far.tier.block
        keys = far.tier.keys(first * block, heads=far.key_heads(call))
        new = torch.cat(pool_bounds(keys, block), -1).to(q.device, torch.promote_types(q.dtype, torch.float32))
        rows = new if rows is None else torch.cat((rows, new), 2)
        held["rows"] = rows
    assert rows is not None
    return rows


def _only(call: Call, i: int) -> Call:
    """The same call for one of its queries."""
    q_pos = None if call.q_pos is None else call.q_pos[:, i : i + 1]
    return Call(
        call.shape._replace(N=1), call.layer, call.heads, call.scale, call.causal, q_pos, call.k_pos,
        rope=call.rope, memory=call.memory, step=call.step, rng=call.rng,
    )  # fmt: skip
