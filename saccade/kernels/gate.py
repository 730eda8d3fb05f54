"""The scores of a trained block gate: means of queries against learned mixtures of key blocks (SeerAttention)."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.rope import Rope
from saccade.kernels.scores import pool, pool_bounds, products

ROWS = 1 << 13  # tokens that are turned back at a time


def gate_queries(q: Tensor, first: int, block: int, rope: Rope) -> Tensor:
    """Means of unrotated queries, rotated to their block's first slot: [B,H,N,D] -> [B,H,ceil(N/block),D].

    `first` is the slot of the first query.
    """
    mean = torch.cat([pool(t, block) for t in _unrotated(q, first, block, rope)], 2)
    return rope(mean, torch.arange(mean.shape[2], device=q.device) * block + first)


def key_features(k: Tensor, block: int, rope: Rope) -> Tensor:
    """Largest, smallest and mean values of unrotated keys from slot 0 on: [B,G,M,D] -> [B,G,ceil(M/block),3D]."""
    parts = []
    for t in _unrotated(k, 0, block, rope):
        low, high = pool_bounds(t, block)
        parts.append(torch.cat((high, low, pool(t, block)), 3))
    return torch.cat(parts, 2)


def gate_keys(features: Tensor, weight: Tensor, block: int, rope: Rope) -> Tensor:
    """The gate's keys: features [B,G,n,3D], weight [H,3D,D] -> [B,H,n,D]."""
    B, G, n, _ = features.shape
    H = weight.shape[0]
    shared = weight.to(features.dtype).unflatten(0, (G, H // G))
    keys = torch.einsum("bgnf,gsfd->bgsnd", features, shared).reshape(B, H, n, -1)
    return rope(keys, torch.arange(n, device=features.device) * block)


def gate_scores(asked: Tensor, keys: Tensor) -> Tensor:
    """What the gate says of each pair of blocks: [B,H,nq,D], [B,H,nk,D] -> [B,H,nq,nk]."""
    return products(asked, keys) * asked.shape[3] ** -0.5


def _unrotated(x: Tensor, first: int, block: int, rope: Rope) -> list[Tensor]:
    """Rows in float32 or wider, as they were before rotation, in pieces of whole blocks."""
    step = max(1, ROWS // block) * block
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).split(step, 2)
    return [rope.free(t, torch.arange(t.shape[2], device=x.device) + (first + i * step)) for i, t in enumerate(wide)]
