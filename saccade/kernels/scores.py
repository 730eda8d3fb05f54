"""Cheap scores of blocks: what a selector looks at instead of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.kernels.select import on_gpu


def pool(x: Tensor, block: int) -> Tensor:
    """Mean of each block of rows: x [B,h,N,D] -> [B,h,ceil(N/block),D]; a short last block averages what it has.

    Sums are kept in float32 or wider; the mean has x's dtype.

    Example:
        >>> pool(torch.tensor([[[[1.0], [3.0], [5.0]]]]), 2).flatten().tolist()
        [2.0, 5.0]
    """
    if on_gpu(x):
        from saccade.kernels.select import triton_pool

        mean = triton_pool.pool(x, block)[0]
        assert mean is not None
        return mean
    B, h, N, D = x.shape
    count = -(-N // block)
    rows = torch.full((count,), block, device=x.device, dtype=torch.float32)
    rows[-1] = N - (count - 1) * block
    padded = torch.nn.functional.pad(x, (0, 0, 0, count * block - N))
    wide = torch.promote_types(x.dtype, torch.float32)
    return (padded.view(B, h, count, block, D).sum(3, dtype=wide) / rows[:, None]).to(x.dtype)


def pool_bounds(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value per feature of each block of rows: x [B,h,N,D] -> two [B,h,ceil(N/block),D].

    Example:
        >>> [t.flatten().tolist() for t in pool_bounds(torch.tensor([[[[1.0], [3.0], [5.0]]]]), 2)]
        [[1.0, 5.0], [3.0, 5.0]]
    """
    if on_gpu(x):
        from saccade.kernels.select import triton_pool

        _, low, high = triton_pool.pool(x, block, mean=False, bounds=True)
        assert low is not None and high is not None
        return low, high
    N = x.shape[2]
    if N % block:
        # the last row again: it changes neither bound of its block
        x = torch.cat((x, x[:, :, -1:].expand(-1, -1, -N % block, -1)), 2)
    blocks = x.unflatten(2, (-1, block))
    return blocks.amin(3), blocks.amax(3)


def pooled_scores(q: Tensor, k: Tensor, block_q: int, block_k: int) -> Tensor:
    """Mean-pooled queries times mean-pooled keys: q [B,H,N,D], k [B,G,M,D] -> [B,H,query blocks,key blocks].

    Scores are float32 or wider: rounded to half precision, many of them would tie. All of them are held;
    `saccade.kernels.topk.top_pooled` chooses by the same scores a few rows at a time.
    """
    return products(pool(q, block_q), pool(k, block_k))


def bound_scores(q: Tensor, k: Tensor, block_k: int) -> Tensor:
    """The most that q·k can be for any key of a block: q [B,H,N,D], k [B,G,M,D] -> [B,H,N,key blocks].

    Feature by feature, the smallest and the largest key value of a block bound the product (Quest, Tang et al. 2024,
    arXiv 2406.10774, github.com/mit-han-lab/quest).

    Example:
        >>> q, k = torch.tensor([[[[2.0, -1.0]]]]), torch.tensor([[[[1.0, 0.0], [0.0, -3.0]]]])
        >>> bound_scores(q, k, 2).item()  # 2 * 1 and -1 * -3
        5.0
    """
    low, high = pool_bounds(k, block_k)
    return products(q.clamp_min(0), high) + products(q.clamp_max(0), low)


def products(q: Tensor, k: Tensor) -> Tensor:
    """q [B,H,n,D] times k [B,G,m,D] in float32 or wider, without copies of k: [B,H,n,m]."""
    B, H, n, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    packed = q.to(wide).reshape(B, k.shape[1], -1, D) @ k.to(wide).transpose(-1, -2)
    return packed.view(B, H, n, -1)
