"""tree_search: key blocks found by halving ranges, without looking at all of them (the search of HiP)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE = 1 << 24  # gathered numbers held at a time


def tree_search(rows: Tensor, k: Tensor, start: int, stop: Tensor, kept: int, block: int) -> Tensor:
    """`kept` key blocks of [start, stop) for each query block, ascending, -1 where there are fewer.

    Args:
        rows: rows of each query block that judge, [B,H,n,R,D].
        k: keys [B,G,M,D].
        start: first block of the range.
        stop: end of each query block's range, [n].
        kept: blocks to find.
        block: slots in a key block.

    Shapes:
        -> int32 [B,H,n,kept]

    Example:
        >>> k = torch.arange(16.0).view(1, 1, 16, 1)  # scores that rise: the search is exact
        >>> tree_search(torch.ones(1, 1, 1, 1, 1), k, 0, torch.tensor([8]), 2, 2).tolist()
        [[[[6, 7]]]]
    """
    B, H, n, R, D = rows.shape
    step = max(1, TILE // (B * H * kept * block * max(D, R)))
    ends = [(a, min(a + step, n)) for a in range(0, n, step)]
    return torch.cat([_descend(rows[:, :, a:b], k, start, stop[a:b], kept, block) for a, b in ends], 2)


def _descend(rows: Tensor, k: Tensor, start: int, stop: Tensor, kept: int, block: int) -> Tensor:
    B, H, n = rows.shape[:3]
    keys = _blocks_of(k, block)
    cuts = (stop - start).clamp_min(0)[:, None] * torch.arange(kept + 1, device=k.device) // kept + start
    low, high = (t.expand(B, H, n, kept) for t in (cuts[:, :-1], cuts[:, 1:]))
    score = _judge(rows, keys, low, k.shape[2], block).masked_fill(high <= low, float("-inf"))
    for _ in range(rounds(keys.shape[2] - start, kept)):
        middle = low + (high - low) // 2
        # the left half's first block is the range's own, whose score is known; a range of one block has no left half
        left = score.masked_fill(middle <= low, float("-inf"))
        right = _judge(rows, keys, middle, k.shape[2], block).masked_fill(high <= middle, float("-inf"))
        best = torch.cat((left, right), 3).topk(kept, dim=3, sorted=False)
        low, high = (torch.cat(t, 3).gather(3, best.indices) for t in ((low, middle), (middle, high)))
        score = best.values
    none = torch.iinfo(torch.int32).max
    index = torch.where(high > low, low, none).sort(3).values
    return index.masked_fill(index == none, -1).int()


def _judge(rows: Tensor, keys: Tensor, blocks: Tensor, length: int, block: int) -> Tensor:
    """The largest q·k of any judging row with any key of each block: blocks [B,H,n,K] -> [B,H,n,K]."""
    B, H, n, K = blocks.shape
    G, D = keys.shape[1], keys.shape[4]
    at = blocks.clamp(max=keys.shape[2] - 1)
    near = keys.gather(2, at.reshape(B, G, -1)[..., None, None].expand(-1, -1, -1, block, D))
    near = near.view(B, H, n, K * block, D)
    products = (rows @ near.transpose(-1, -2)).amax(3).view(B, H, n, K, block)
    slot = at[..., None] * block + torch.arange(block, device=at.device)
    return products.masked_fill(slot >= length, float("-inf")).amax(4)


def _blocks_of(k: Tensor, block: int) -> Tensor:
    """Keys in whole blocks [B,G,blocks,block,D]; the last one is filled up."""
    count = -(-k.shape[2] // block)
    return torch.nn.functional.pad(k, (0, 0, 0, count * block - k.shape[2])).unflatten(2, (count, block))


def rounds(blocks: int, kept: int) -> int:
    """Halvings until the largest of `kept` ranges of so many blocks is a single block."""
    return math.ceil(math.log2(max(1, -(-blocks // kept))))
