"""From scores to patterns: the largest blocks of a row, the largest tokens of a query.

Where scores tie, the lowest index wins, in PyTorch and in the kernels alike. NaN among the scores is not looked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Blocks, Tokens, per_head
from saccade.kernels.scores import pool, products
from saccade.kernels.select import SCRATCH, on_gpu


def top_blocks(scores: Tensor, count: int, block_q: int, block_k: int, call: Call) -> Blocks:
    """The `count` key blocks with the largest scores for each query block, among those that its last row may see.

    Args:
        scores: [B, H, query blocks, key blocks]; -inf excludes a block, +inf forces it in.
        count: blocks kept, at least 1.
        block_q: rows in a query block.
        block_k: slots in a key block.
        call: a contiguous call.
    """
    return Blocks(_lines(scores, count, block_q, block_k, call, 0), block_q, block_k)


def top_pooled(
    q: Tensor,
    k: Tensor,
    count: int,
    block_q: int,
    block_k: int,
    call: Call,
    sink: int = 0,
    forced: tuple[Tensor, Tensor] | None = None,
) -> Blocks:
    """`top_blocks` of `pooled_scores`, a tile of query blocks at a time: all scores are never held at once.

    Args:
        q: queries.
        k: keys.
        count: blocks kept, at least 1; those forced in count.
        block_q: rows in a query block.
        block_k: slots in a key block.
        call: a contiguous call.
        sink: key blocks from the start that every query block reads.
        forced: int32 [query blocks] each: the first key block that a query block must read, and the one after the last.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Blocks [B,H,ceil(N/block_q),min(count,ceil(M/block_k))]

    Example:
        >>> q, k = torch.ones(1, 1, 6, 1), torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0, 9.0]).view(1, 1, 6, 1)
        >>> top_pooled(q, k, 2, 2, 1, Call.of(q, k)).index.tolist()
        [[[[0, 1], [1, 3], [1, 5]]]]
    """
    B, H, N, _ = q.shape
    # a choice has no gradient
    mean_q, mean_k = pool(q.detach(), block_q), pool(k.detach(), block_k)
    nq, nk = mean_q.shape[2], mean_k.shape[2]
    fused = on_gpu(mean_q, mean_k, width=q.shape[3])
    step = max(1, min(nq, SCRATCH // (B * H * nk)))
    scratch = torch.empty((B, H, step, nk), dtype=torch.float32, device=q.device) if fused else None
    lines = []
    for a in range(0, nq, step):
        b = min(a + step, nq)
        # key blocks that no row of the tile sees are not scored
        m = min(nk, -(-(min(b * block_q, N) + call.offset) // block_k)) if call.causal else nk
        if scratch is not None:
            from saccade.kernels.select import triton_topk

            scores = scratch[:, :, : b - a, :m]
            triton_topk.products(mean_q[:, :, a:b], mean_k, scores, a, block_q, block_k, call, sink, forced)
        else:
            scores = products(mean_q[:, :, a:b], mean_k[:, :, :m])
            at = torch.arange(m, device=q.device)
            must = at < sink
            if forced is not None:
                must = must | ((at >= forced[0][a:b, None]) & (at < forced[1][a:b, None]))
            if sink or forced is not None:
                scores = scores.masked_fill(must, float("inf"))
        lines.append(_lines(scores, count, block_q, block_k, call, a))
    return Blocks(lines[0] if len(lines) == 1 else torch.cat(lines, 2), block_q, block_k)


def largest(scores: Tensor, count: int) -> Tensor:
    """The largest entries of each row [...,m] -> int32 [...,min(count,m)], ascending, -1 where fewer are above -inf.

    Example:
        >>> largest(torch.tensor([5.0, -torch.inf, 7.0, 5.0]), 2).tolist()
        [0, 2]
    """
    scores = scores.detach()
    if scores.ndim == 3 and on_gpu(scores):
        from saccade.kernels.select import triton_topk

        index = triton_topk.largest(scores, count)
        if index is not None:
            return index
    return _largest(scores, count)


def top_tokens(q: Tensor, k: Tensor, count: int, call: Call) -> Tokens:
    """The `count` keys with the largest q·k for each query [B,H,N,count], -1 where fewer are visible.

    All scores are formed: meant for few queries (decode). Largest first; which of equal ones comes is `torch.topk`'s
    choice.
    """
    B, H, G, N, M = call.shape
    scores = (q.reshape(B, G, -1, q.shape[3]) @ k.transpose(-1, -2)).view(B, H, N, M)
    q_pos, k_pos = call.positions(q.device)
    seen = call.sees(q_pos[:, None, :, None], per_head(k_pos, call)[:, :, None, :])
    best = scores.masked_fill(~seen, float("-inf")).topk(min(count, M), dim=-1)
    return Tokens(best.indices.masked_fill(best.values.isneginf(), -1).int())


def _lines(scores: Tensor, count: int, block_q: int, block_k: int, call: Call, first: int) -> Tensor:
    """Lists int32 [B,H,n,min(count,all key blocks)] of query blocks from `first` on, by their scores [B,H,n,m]."""
    scores = scores.detach()
    if on_gpu(scores):
        from saccade.kernels.select import triton_topk

        found = triton_topk.top_lines(scores, count, block_q, block_k, call, first)
        if found is not None:
            return found
    n, m = scores.shape[2:]
    if call.causal:
        starts = torch.arange(m, device=scores.device) * block_k
        last = (torch.arange(first + 1, first + n + 1, device=scores.device) * block_q).clamp(max=call.shape.N)
        scores = scores.masked_fill(starts >= last[:, None] + call.offset, float("-inf"))
    index = _largest(scores, count)
    width = min(count, -(-call.shape.M // block_k))
    return torch.nn.functional.pad(index, (0, width - index.shape[-1]), value=-1)


def _largest(scores: Tensor, count: int) -> Tensor:
    m, count = scores.shape[-1], min(count, scores.shape[-1])
    best = scores.topk(count, sorted=False)
    edge = best.values.amin(-1, keepdim=True)
    if scores.device.type == "cpu" and not _tied(scores, edge, count):
        # a CPU may look first: without ties there is nothing to decide
        index = best.indices.masked_fill(best.values.isneginf(), m).sort(-1).values
        return index.masked_fill(index == m, -1).int()
    above, equal = scores > edge, (scores == edge) & (scores > float("-inf"))
    spare = count - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= spare))
    place = torch.where(chosen, chosen.cumsum(-1) - 1, count)
    at = torch.arange(m, dtype=torch.int32, device=scores.device).expand(scores.shape)
    index = torch.full((*scores.shape[:-1], count + 1), -1, dtype=torch.int32, device=scores.device)
    # what is not chosen lands in one column too many, which is cut off
    return index.scatter_(-1, place, at)[..., :count].contiguous()


def _tied(scores: Tensor, edge: Tensor, count: int) -> bool:
    """Does a row have more entries at its smallest chosen value or above than are chosen?"""
    return bool((((scores >= edge).sum(-1, keepdim=True) > count) & ~edge.isneginf()).any())
