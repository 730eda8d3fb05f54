"""Keys whose neighbours are alike, and how much of the weight a choice of blocks keeps."""

import torch


def smooth(seed, N=8192, D=64, walk=0.05):
    """Keys along a slow random walk on a sphere: neighbours are alike. Queries look for a place on it."""
    rng = torch.Generator().manual_seed(seed)
    k = torch.randn(1, 1, D, generator=rng) + walk * torch.randn(1, N, D, generator=rng).cumsum(1)
    k = k / k.norm(dim=-1, keepdim=True) * D**0.5
    at = torch.randint(0, N - 1200, (16,), generator=rng)
    return (k[:, at] * 2)[None], k[None]


def kept_mass(index, q, k, block):
    weights = torch.softmax(q[0, 0] @ k[0, 0].T / q.shape[-1] ** 0.5, -1)
    blocks = weights.view(len(weights), -1, block).sum(-1)
    return float(blocks.gather(1, index.long()).sum(1).mean())
