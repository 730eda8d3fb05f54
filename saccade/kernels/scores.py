"""Cheap scores of blocks: what a selector looks at instead of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(x: Tensor, block: int) -> Tensor:
    """Mean of each block of rows: x [B,h,N,D] -> [B,h,ceil(N/block),D]; a short last block averages what it has.

    Example:
        >>> pool(torch.tensor([[[[1.0], [3.0], [5.0]]]]), 2).flatten().tolist()
        [2.0, 5.0]
    """
    B, h, N, D = x.shape
    count = -(-N // block)
    rows = torch.full((count,), block, device=x.device, dtype=x.dtype)
    rows[-1] = N - (count - 1) * block
    padded = torch.nn.functional.pad(x, (0, 0, 0, count * block - N))
    return padded.view(B, h, count, block, D).sum(3) / rows[:, None]


def pooled_scores(q: Tensor, k: Tensor, block_q: int, block_k: int) -> Tensor:
    """Mean-pooled queries times mean-pooled keys: q [B,H,N,D], k [B,G,M,D] -> [B,H,query blocks,key blocks]."""
    B, H, _, D = q.shape
    G = k.shape[1]
    mean_q, mean_k = pool(q, block_q), pool(k, block_k)
    packed = mean_q.reshape(B, G, -1, D) @ mean_k.transpose(-1, -2)
    return packed.view(B, H, mean_q.shape[2], -1)
