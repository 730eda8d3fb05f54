"""Fetch: of what was moved out of the store, only the blocks whose keys can answer best are brought near."""

from __future__ import annotations

from dataclasses import dataclass

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

ROOM = 64  # far blocks that bounds have room for beyond what is needed
STEP = 128  # far blocks of a head whose bounds are formed at a time


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
        N = call.shape.N
        if not self._chooses(far, call):
            return merge([attend(q, k, v, None, call), everything(q, far, call)])
        index = self._chosen(q, far, call)
        coming = expect(index[:, :, 0], far, call)
        near = attend(q, k, v, None, call)
        parts = []
        for i in range(N):
            parts.append(chosen(q[:, :, i : i + 1], index[:, :, i], far, _only(call, i), coming))
            coming = None
        lse = torch.cat([part.lse for part in parts if part.lse is not None], 2)
        return merge([near, Out(torch.cat([part.o for part in parts], 2), lse)])

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        far = far_of(call)
        if far is None:
            return 0.0
        read = self.blocks * far.tier.block if self._chooses(far, call) else far.tier.tokens
        return float(B * H * N * (M + read)) + self.scored(call)

    def scored(self, call: Call) -> float:
        far = far_of(call)
        if far is None or not self._chooses(far, call):
            return 0.0
        # both bounds of each block
        return float(call.shape.B * call.shape.H * call.shape.N * 2 * far.tier.blocks)

    def _chooses(self, far: Far, call: Call) -> bool:
        """Decoding, and more blocks lie far than a query reads."""
        return phase_of(call.shape.N, call.shape.M) == "decode" and far.tier.blocks > self.blocks

    def _chosen(self, q: Tensor, far: Far, call: Call) -> Tensor:
        """Blocks of each key head and query, in host memory [B,G,N,blocks]."""
        B, H, G, N, _ = call.shape
        scores = _scores(torch.cat((q.clamp_max(0), q.clamp_min(0)), -1), _bounds(far, q, call))
        scores = (scores * call.softmax_scale(q.shape[3])).log_softmax(-1).view(B, G, H // G, N, -1).amax(2)
        return largest(scores.flatten(1, 2), self.blocks).view(B, G, N, -1).cpu()


class Bounds:
    """Smallest and largest of each feature in each far block, in parts that have room to grow.

    A longer copy beside the old one would be twice the bytes for a moment; a new part is only what is new.

    Shapes: parts [B,G,room,2D], of which `counts` blocks are there
    """

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.counts: list[int] = []

    @property
    def count(self) -> int:
        """Blocks."""
        return sum(self.counts)

    def grow(self, more: int, like: Tensor) -> None:
        """A part for `more` blocks and some after them, where the last part has no room for them."""
        if not self.parts or self.parts[-1].shape[2] < self.counts[-1] + more:
            self.parts.append(like.new_zeros(*like.shape[:2], more + ROOM, like.shape[3]))
            self.counts.append(0)

    def filled(self) -> list[Tensor]:
        """What is there of each part."""
        return [part[:, :, :count] for part, count in zip(self.parts, self.counts, strict=True)]

    def select(self, index: Tensor) -> Bounds:
        """Rows of the batch, as the store picks them."""
        other = Bounds()
        other.parts = [part.index_select(0, index.to(part.device)) for part in self.parts]
        other.counts = list(self.counts)
        return other

    def bytes(self) -> int:
        """Bytes, room to grow included."""
        return sum(part.numel() * part.element_size() for part in self.parts)


def _scores(q: Tensor, bounds: Bounds) -> Tensor:
    """Products with all bounds; on a GPU without a float32 copy of them."""
    found = []
    for part in bounds.filled():
        if not q.is_cuda or q.dtype == torch.float32:
            found.append(products(q, part))
            continue
        (B, H, N, width), (G, m) = q.shape, part.shape[1:3]
        packed, keys = q.reshape(B * G, H // G * N, width), part.flatten(0, 1).transpose(1, 2)
        found.append(torch.bmm(packed, keys, out_dtype=torch.float32).view(B, H, N, m))
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _bounds(far: Far, q: Tensor, call: Call) -> Bounds:
    """The bounds of all far blocks; those of new blocks are added."""
    bounds: Bounds = call.memory.setdefault(f"fetch {call.heads}", Bounds())
    B, _, G, _, _ = call.shape
    tier, first, kv = far.tier, bounds.count, far.key_heads(call)
    more = tier.blocks - first
    if more:
        # the smallest and the largest of some keys are keys: nothing is lost in their own type
        bounds.grow(more, q.new_zeros(B, G, 0, 2 * q.shape[3]))
        room = bounds.parts[-1][:, :, bounds.counts[-1] :]
        index = torch.arange(first, first + more).expand(B, G, -1)
        if first and index.numel() <= tier.places // 4:
            # a few new ones: what the cache holds stays
            room[:, :, :more] = torch.cat(pool_bounds(tier.fetch(index, heads=kv)[0], tier.block), -1)
        else:
            for rows, heads, part, k, _ in tier.sweep(index, heads=kv):
                for a in range(part.start, part.stop, STEP):
                    b = min(a + STEP, part.stop)
                    keys = k[:, :, (a - part.start) * tier.block : (b - part.start) * tier.block]
                    room[rows, heads, a:b] = torch.cat(pool_bounds(keys, tier.block), -1)
        bounds.counts[-1] += more
    return bounds


def _only(call: Call, i: int) -> Call:
    """The same call for one of its queries."""
    q_pos = None if call.q_pos is None else call.q_pos[:, i : i + 1]
    return Call(
        call.shape._replace(N=1), call.layer, call.heads, call.scale, call.causal, q_pos, call.k_pos,
        rope=call.rope, memory=call.memory, step=call.step, rng=call.rng,
    )  # fmt: skip
