"""Block mass: the softmax weight that the rows of a query block give each key block, all scores formed.

No shortcut: the measure that shortcuts are held to. Plain PyTorch here, some query blocks at a time, so that memory
grows with the length and not with its square; on a GPU a prefill goes through `triton_block_mass`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.kernels.select import on_gpu


def block_mass(q: Tensor, k: Tensor, call: Call, block_q: int, block_k: int) -> Tensor:
    """Dense attention's weights summed over blocks of queries and keys.

    Args:
        q: queries.
        k: keys.
        call: a contiguous call.
        block_q: rows in a query block.
        block_k: slots in a key block.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> [B,H,ceil(N/block_q),ceil(M/block_k)] float32 (float64 for float64)

    Example:
        >>> q = k = torch.zeros(1, 1, 4, 2)
        >>> [round(mass, 3) for mass in block_mass(q, k, Call.of(q, k), 2, 2).flatten().tolist()]
        [2.0, 0.0, 1.167, 0.833]
    """
    # a few queries are one piece of the loop below
    if block_q < call.shape.N and on_gpu(q, k, width=q.shape[3]):
        from saccade.kernels.select import triton_block_mass

        return triton_block_mass.block_mass(q, k, call, block_q, block_k)
    return _mass(q, k, call, block_q, block_k)


def _mass(q: Tensor, k: Tensor, call: Call, block_q: int, block_k: int) -> Tensor:
    B, H, G, N, M = call.shape
    q = q * call.softmax_scale(q.shape[3])
    nk = -(-M // block_k)
    found = []
    for a in range(0, N, block_q):
        b = min(a + block_q, N)
        # keys after the block's last row weigh nothing: half of the work
        end = min(M, call.offset + b) if call.causal else M
        scores = (q[:, :, a:b].reshape(B, G, -1, q.shape[3]) @ k[:, :, :end].transpose(-1, -2)).view(B, H, b - a, end)
        if call.causal:
            rows = torch.arange(call.offset + a, call.offset + b, device=q.device)
            scores = scores.masked_fill(torch.arange(end, device=q.device) > rows[:, None], float("-inf"))
        mass = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).sum(2)
        mass = torch.nn.functional.pad(mass, (0, nk * block_k - end))
        found.append(mass.view(B, H, nk, block_k).sum(-1))
    return torch.stack(found, 2)
