"""Runs: of the blocks that a call reads, those that stand side by side in the block cache are read without a copy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Blocks
from saccade.kernels.attend import attend
from saccade.kernels.merge import Out, merge

PACKED = 16  # queries that are attended together
LEAST = 1024  # tokens of a run that is worth a call of its own: fewer are copied together sooner


def attend_placed(q: Tensor, k: Tensor, v: Tensor, at: Tensor, block: int, call: Call) -> Out:
    """Attention of each row to all of its blocks of one common store.

    On a GPU the kernels read listed blocks where they lie. On a CPU lists are copied side by side first, which costs
    several times what attention to them does; whoever reads everything finds nearly all of it in a few long stretches,
    because blocks come into an empty cache in order.

    Args:
        q: queries, a row for each key head and row of the batch.
        k, v: the store, all places of it.
        at: the places of each row's blocks, ascending, -1 = none.
        block: tokens in a block.
        call: whose layer and scale it is.

    Shapes:
        q [R,h,N,D], k [1,1,S,D], v [1,1,S,Dv], at [R,K] -> Out(o [R,h,N,Dv], lse [R,h,N])

    Example:
        >>> q, kv = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 6, 4)
        >>> out = attend_placed(q, kv, kv, torch.tensor([[0, 2]]), 2, Call.of(q, kv))
        >>> four = kv[:, :, [0, 1, 4, 5]]
        >>> torch.allclose(out.o, attend(q, four, four).o, atol=1e-6)
        True
    """
    spans = runs(at, -(-LEAST // block)) if q.device.type == "cpu" else []
    if not spans:
        return _listed(q, k, v, at, block, call)
    single = torch.ones(at.shape[1], dtype=torch.bool)
    outs = []
    for a, b in spans:
        single[a:b] = False
        parts = []
        for row, first in enumerate(at[:, a].tolist()):
            mine, stretch = q[row : row + 1], slice(first * block, (first + b - a) * block)
            keys, values = k[:, :, stretch], v[:, :, stretch]
            parts.append(attend(mine, keys, values, None, all_seen(mine, keys, call)))
        outs.append(Out(torch.cat([part.o for part in parts]), torch.cat([lse_of(part) for part in parts])))
    if bool(single.any()):
        outs.append(_listed(q, k, v, at[:, single], block, call))
    return merge(outs)


def runs(at: Tensor, least: int) -> list[tuple[int, int]]:
    """Columns [a,b) of places [R,K], at least `least` of them, in which each row's places follow one another.

    Example:
        >>> runs(torch.tensor([[0, 1, 2, 5, 6, 9], [3, 4, 5, 7, 8, 9]]), 2)
        [(0, 3), (3, 5)]
    """
    R, K = at.shape
    if not R or least > K:
        return []
    # -1 and 0 are no neighbours
    broken = ((at[:, 1:] != at[:, :-1] + 1) | (at[:, :-1] < 0)).any(0)
    ends = [0, *(broken.nonzero().flatten() + 1).tolist(), K]
    return [(a, b) for a, b in pairwise(ends) if b - a >= least and bool((at[:, a] >= 0).all())]


def all_seen(q: Tensor, k: Tensor, call: Call) -> Call:
    """Every query sees every key: far tokens are older than all of them."""
    fields: dict[str, Any] = dict(layer=call.layer, scale=call.scale, causal=False)
    if q.shape[2] > k.shape[2]:
        # more queries than keys cannot be the last of them
        zeros = torch.zeros(1, 1, max(q.shape[2], k.shape[2]), dtype=torch.long, device=q.device)
        fields |= dict(q_pos=zeros[0, :, : q.shape[2]], k_pos=zeros[:, :, : k.shape[2]])
    return Call.of(q, k, **fields)


def _listed(q: Tensor, k: Tensor, v: Tensor, at: Tensor, block: int, call: Call) -> Out:
    """Blocks where they lie, by a list of their places."""
    keys, values = (t.expand(len(q), -1, -1, -1) for t in (k, v))
    return attend(q, keys, values, Blocks(at[:, None, None], PACKED, block), all_seen(q, keys, call))


def lse_of(out: Out) -> Tensor:
    """The log-sum-exp, which was asked for."""
    assert out.lse is not None
    return out.lse
