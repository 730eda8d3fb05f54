"""tree_step: the search of `tree_search` for one query, over a store whose length only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.kernels.select import on_gpu
from saccade.kernels.tree import rounds


def tree_step(
    q: Tensor, k: Tensor, start: int, stop: Tensor, kept: int, block: int, length: Tensor, now: Tensor | None = None
) -> Tensor:
    """Up to `kept` key blocks of [start, stop) for each query head, ascending, -1 where there are fewer.

    It finds what `tree_search` finds among the first `length` keys. Shapes follow from all the room M, so that a
    captured graph can be replayed while the store grows; halvings beyond what a shorter store needs change nothing.

    Args:
        q: one query, [B,H,1,D].
        k: keys with all their room [B,G,M,D].
        start: first block of the range.
        stop: end of the range, int64 [1] on the device.
        kept: blocks to find at most.
        block: slots in a key block.
        length: keys stored, int64 [1] on the device.
        now: blocks to find, int64 [1] on the device; None = `kept`.

    Shapes:
        -> int32 [B,H,1,kept]

    Example:
        >>> k = torch.arange(20.0).view(1, 1, 20, 1)
        >>> stop, length = torch.tensor([8]), torch.tensor([16])
        >>> tree_step(torch.ones(1, 1, 1, 1), k, 0, stop, 2, 2, length).tolist()
        [[[[6, 7]]]]
    """
    B, H, M = *q.shape[:2], k.shape[2]
    halvings = rounds(-(-M // block) - start, kept)
    if on_gpu(q, k, width=q.shape[3]):
        from saccade.kernels import triton_tree

        if triton_tree.serves(q, kept, block):
            many = stop.new_full((1,), kept) if now is None else now
            return triton_tree.search(q, k, start, stop, kept, block, length, many, halvings)
    parts = torch.arange(kept + 1, device=k.device)
    # ranges that are not wanted now are empty, at the end
    spare = None if now is None else parts[:-1] >= now
    parts = parts if now is None else torch.minimum(parts, now)
    cuts = (stop - start).clamp_min(0) * parts // (kept if now is None else now) + start
    low, high = (t.expand(B, H, kept) for t in (cuts[:-1], cuts[1:]))
    score = _judge(q, k, low, length, block).masked_fill(high <= low, float("-inf"))
    for _ in range(halvings):
        middle = low + (high - low) // 2
        # the left half's first block is the range's own, whose score is known; a range of one block has no left half
        left = score.masked_fill(middle <= low, float("-inf"))
        right = _judge(q, k, middle, length, block).masked_fill(high <= middle, float("-inf"))
        best = torch.cat((left, right), 2).topk(kept, dim=2, sorted=now is not None)
        low, high = (torch.cat(t, 2).gather(2, best.indices) for t in ((low, middle), (middle, high)))
        score = best.values
        if spare is not None:
            low, score = torch.where(spare, high, low), score.masked_fill(spare, float("-inf"))
    none = torch.iinfo(torch.int32).max
    index = torch.where(high > low, low, none).sort(2).values
    return index.masked_fill(index == none, -1).int()[:, :, None]


def _judge(q: Tensor, k: Tensor, blocks: Tensor, length: Tensor, block: int) -> Tensor:
    """The largest q·k of the query with any stored key of each block: blocks [B,H,K] -> [B,H,K]."""
    B, H, K = blocks.shape
    G, M, D = k.shape[1:]
    slots = (blocks[..., None] * block + torch.arange(block, device=k.device)).flatten(2)
    near = k.gather(2, slots.clamp(max=M - 1).view(B, G, -1, 1).expand(-1, -1, -1, D)).view(B, H, K * block, D)
    products = (q @ near.transpose(-1, -2))[:, :, 0]
    return products.masked_fill(slots >= length, float("-inf")).view(B, H, K, block).amax(3)
