"""From scores to patterns: the largest blocks of a row, the largest tokens of a query."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Blocks, Tokens, per_head


def top_blocks(scores: Tensor, count: int, block_q: int, block_k: int, call: Call) -> Blocks:
    """The `count` key blocks with the largest scores for each query block, among those that its last row may see.

    Args:
        scores: [B, H, query blocks, key blocks]; -inf excludes a block, +inf forces it in.
        count: blocks kept, at least 1.
        block_q: rows in a query block.
        block_k: slots in a key block.
        call: a contiguous call.
    """
    nq, nk = scores.shape[2:]
    starts = torch.arange(nk, device=scores.device) * block_k
    if call.causal:
        last = (torch.arange(1, nq + 1, device=scores.device) * block_q).clamp(max=call.shape.N) + call.offset
        scores = scores.masked_fill(starts >= last[:, None], float("-inf"))
    best = scores.topk(min(count, nk), dim=-1)
    index = best.indices.masked_fill(best.values.isneginf(), nk).sort(-1).values
    return Blocks(index.masked_fill(index == nk, -1).int(), block_q, block_k)


def top_tokens(q: Tensor, k: Tensor, count: int, call: Call) -> Tokens:
    """The `count` keys with the largest q·k for each query [B,H,N,count], -1 where fewer are visible.

    All scores are formed: meant for few queries (decode).
    """
    B, H, G, N, M = call.shape
    scores = (q.reshape(B, G, -1, q.shape[3]) @ k.transpose(-1, -2)).view(B, H, N, M)
    q_pos, k_pos = call.positions(q.device)
    seen = call.sees(q_pos[:, None, :, None], per_head(k_pos, call)[:, :, None, :])
    best = scores.masked_fill(~seen, float("-inf")).topk(min(count, M), dim=-1)
    return Tokens(best.indices.masked_fill(best.values.isneginf(), -1).int())
