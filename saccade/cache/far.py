"""Far: the tokens of some heads that have left the store for a tier, and attention to all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.cache.tier import Tier
from saccade.core.call import Call
from saccade.kernels.attend import attend
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
        if name.startswith(KEY) and isinstance(held, Far) and held.tier.blocks and set(call.heads) <= set(held.heads):
            return held
    return None


def everything(q: Tensor, far: Far, call: Call) -> Out:
    """Attention to all far tokens, a piece at a time.

    Shapes:
        q [B,H,N,D] -> Out(o [B,H,N,Dv], lse [B,H,N])
    """
    B, _, G, _, _ = call.shape
    return chosen(q, torch.arange(far.tier.blocks).expand(B, G, -1), far, call)


def chosen(q: Tensor, index: Tensor, far: Far, call: Call) -> Out:
    """Attention to far blocks, a piece at a time: half of the cache is read while the other half arrives.

    Args:
        q: queries of the call, all of which read the same blocks of their key head.
        index: blocks of each row and key head of the call, each once.

    Shapes:
        q [B,H,N,D], index [B,G,K] -> Out(o [B,H,N,Dv], lse [B,H,N])
    """
    _, H, G, _, _ = call.shape
    tier, share, kv = far.tier, H // G, far.key_heads(call)
    found: dict[tuple[int, int], Out] = {}
    pieces = _pieces(index, tier.places)
    for number, (rows, heads, part) in enumerate(pieces):
        k, v = tier.fetch(index[rows, heads, part], rows, kv[heads])
        if number + 1 < len(pieces):
            after = pieces[number + 1]
            tier.prefetch(index[after], after[0], kv[after[1]])
        mine = q[rows, heads.start * share : heads.stop * share]
        out = attend(mine, k, v, None, _all_seen(mine, k, call))
        at = (rows.start, heads.start)
        found[at] = merge([found[at], out]) if at in found else out
    starts = sorted({r for r, _ in found}), sorted({h for _, h in found})
    o = torch.cat([torch.cat([found[r, h].o for h in starts[1]], 1) for r in starts[0]])
    lse = torch.cat([torch.cat([_lse(found[r, h]) for h in starts[1]], 1) for r in starts[0]])
    return seen_by(Out(o, lse), call)


def expect(index: Tensor, far: Far, call: Call) -> None:
    """Start moving what `chosen` will read first."""
    rows, heads, part = _pieces(index, far.tier.places)[0]
    far.tier.prefetch(index[rows, heads, part], rows, far.key_heads(call)[heads])


def seen_by(out: Out, call: Call) -> Out:
    """The same, but queries that are not real saw nothing."""
    if call.q_pos is None or out.lse is None:
        return out
    unreal = (call.q_pos < 0)[:, None, :]
    return Out(out.o.masked_fill(unreal[..., None], 0.0), out.lse.masked_fill(unreal, float("-inf")))


def _pieces(index: Tensor, places: int) -> list[tuple[slice, slice, slice]]:
    """Rows, heads and blocks that are read together: half of the cache's places, at least one block."""
    B, G, K = index.shape
    most = max(1, places // 2)
    b = min(B, most)
    g = min(G, most // b)
    n = most // (b * g)
    return [
        (slice(r, min(r + b, B)), slice(h, min(h + g, G)), slice(a, min(a + n, K)))
        for r in range(0, B, b)
        for h in range(0, G, g)
        for a in range(0, K, n)
    ]


def _all_seen(q: Tensor, k: Tensor, call: Call) -> Call:
    """Every query sees every key: far tokens are older than all of them."""
    fields: dict[str, Any] = dict(layer=call.layer, scale=call.scale, causal=False)
    if q.shape[2] > k.shape[2]:
        # more queries than keys cannot be the last of them
        zeros = torch.zeros(1, 1, max(q.shape[2], k.shape[2]), dtype=torch.long, device=q.device)
        fields |= dict(q_pos=zeros[0, :, : q.shape[2]], k_pos=zeros[:, :, : k.shape[2]])
    return Call.of(q, k, **fields)


def _lse(out: Out) -> Tensor:
    assert out.lse is not None
    return out.lse
