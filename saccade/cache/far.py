"""Far: the tokens of some heads that have left the store for a tier, and attention to all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache.runs import PACKED, all_seen, attend_placed, lse_of
from saccade.cache.tier import Coming, Tier
from saccade.core.call import Call
from saccade.kernels.attend import attend
from saccade.kernels.attend.tile import training
from saccade.kernels.merge import Out, merge

KEY = "far"


@dataclass
class Far:
    """Tokens `sink` to `sink + tier.tokens` of the sequence, for some heads; they lie in a method's memory.

    All of them are older than any query to come: what is near the end of a sequence stays in the store.

    Args:
        heads: ids of the query heads, those that share a key head side by side.
        share: query heads for each key head of the tier.
        sink: position of the first token.
        tier: where they are.
    """

    heads: tuple[int, ...]
    share: int
    sink: int
    tier: Tier

    def select(self, index: Tensor) -> Far:
        """Rows of the batch, as the store picks them."""
        return Far(self.heads, self.share, self.sink, self.tier.select(index))

    def bytes(self) -> int:
        """Bytes on both sides."""
        return self.tier.bytes()

    def key_heads(self, call: Call) -> list[int]:
        """The tier's key head for each key head of a call."""
        share = call.shape.H // call.shape.G
        return [self.heads.index(call.heads[g * share]) // self.share for g in range(call.shape.G)]


def far_of(call: Call) -> Far | None:
    """What lies far away for the heads of a call, or None.

    Example:
        >>> q = torch.zeros(1, 2, 1, 4)
        >>> far_of(Call.of(q, q)) is None
        True
    """
    for name, held in call.memory.items():
        if isinstance(held, Far) and name.startswith(KEY) and held.tier.blocks and set(call.heads) <= set(held.heads):
            return held
    return None


def everything(q: Tensor, far: Far, call: Call) -> Out:
    """Attention to all far tokens.

    Shapes:
        q [B,H,N,D] -> Out(o [B,H,N,Dv], lse [B,H,N])
    """
    B, _, G, _, _ = call.shape
    return chosen(q, torch.arange(far.tier.blocks).expand(B, G, -1), far, call)


def chosen(q: Tensor, index: Tensor, far: Far, call: Call, coming: Coming | None = None) -> Out:
    """Attention to far blocks where they lie in the cache of blocks on the device, without a copy.

    A few queries read blocks that all have a place in the cache, and what they need is mostly there already. For more
    blocks, and for many queries, the cache is read in halves: one is attended to while the other arrives. Where
    gradients are asked for it is the same, but in copies that live until the backward pass.

    Args:
        q: queries of the call, all of which read the same blocks of their key head.
        index: blocks of each row and key head of the call, each once.
        coming: what `expect` gave for them, if nothing was asked of the tier since.

    Shapes:
        q [B,H,N,D], index [B,G,K] -> Out(o [B,H,N,Dv], lse [B,H,N])
    """
    few = call.shape.N <= PACKED and index.numel() <= far.tier.places and not training(q)
    return seen_by(_placed(q, index, far, call, coming) if few else _swept(q, index, far, call), call)


def expect(index: Tensor, far: Far, call: Call) -> Coming | None:
    """Start moving what `chosen` will read."""
    if index.numel() > far.tier.places:
        return None
    return far.tier.prefetch(index, heads=far.key_heads(call))


def seen_by(out: Out, call: Call) -> Out:
    """The same, but queries that are not real saw nothing."""
    if call.q_pos is None or out.lse is None:
        return out
    unreal = (call.q_pos < 0)[:, None, :]
    return Out(out.o.masked_fill(unreal[..., None], 0.0), out.lse.masked_fill(unreal, float("-inf")))


def _placed(q: Tensor, index: Tensor, far: Far, call: Call, coming: Coming | None) -> Out:
    """All blocks at once: each row and key head is a row of a batch that lists blocks of one common store."""
    B, H, G, N, _ = call.shape
    k, v, at = far.tier.place(index if coming is None else coming, heads=far.key_heads(call))
    out = attend_placed(q.reshape(B * G, H // G, N, -1), k, v, at.flatten(0, 1), far.tier.block, call)
    return Out(out.o.view(B, H, N, -1), lse_of(out).view(B, H, N))


def _swept(q: Tensor, index: Tensor, far: Far, call: Call) -> Out:
    """A piece at a time, merged as they come."""
    share = call.shape.H // call.shape.G
    found: dict[tuple[int, int], Out] = {}
    for rows, heads, _, k, v in far.tier.sweep(index, heads=far.key_heads(call)):
        mine = q[rows, heads.start * share : heads.stop * share]
        if training(q):
            # a backward pass asks for them when other blocks have long taken their places
            k, v = k.clone(), v.clone()
        out = attend(mine, k, v, None, all_seen(mine, k, call))
        at = (rows.start, heads.start)
        found[at] = merge([found[at], out]) if at in found else out
    starts = sorted({r for r, _ in found}), sorted({h for _, h in found})
    o = torch.cat([torch.cat([found[r, h].o for h in starts[1]], 1) for r in starts[0]])
    return Out(o, torch.cat([torch.cat([lse_of(found[r, h]) for h in starts[1]], 1) for r in starts[0]]))
