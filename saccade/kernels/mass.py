"""Softmax mass per key: what a set of queries, together, give each key. For policies that keep what was looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import per_head
from saccade.kernels.select import on_gpu

TILE = 1 << 22  # scores held at a time
KERNEL = 64  # queries from which on the kernel is worth its launches


def key_mass(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """The weights that all queries of a call give each key under dense attention, summed over the queries.

    N x M scores are formed, TILE of them at a time: as dear as the first half of dense attention, in any store. On a
    GPU a prompt in a store without holes goes through a kernel that forms them twice and writes none.

    Args:
        q: queries.
        k: keys.
        call: the call; a query that is not real adds nothing.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> [B,H,M] float32 (float64 for float64)

    Example:
        >>> q = k = torch.zeros(1, 1, 2, 4)
        >>> key_mass(q, k, Call.of(q, k)).flatten().tolist()
        [1.5, 0.5]
    """
    B, H, G, N, M = call.shape
    if N >= KERNEL and call.contiguous and on_gpu(q, k, width=q.shape[3]):
        from saccade.kernels.select import triton_key_mass

        return triton_key_mass.key_mass(q, k, call)
    return _mass(q, k, call)


def _mass(q: Tensor, k: Tensor, call: Call) -> Tensor:
    B, H, G, N, M = call.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    q_pos, k_pos = call.positions(q.device)
    k_pos = per_head(k_pos, call)[:, :, None, :]
    mass = q.new_zeros((B, H, M), dtype=wide)
    step = max(1, TILE // (B * H * M))
    for a in range(0, N, step):
        rows = (q[:, :, a : a + step] * call.softmax_scale(q.shape[3])).reshape(B, G, -1, q.shape[3])
        scores = (rows @ k.transpose(-1, -2)).view(B, H, -1, M)
        seen = call.sees(q_pos[:, None, a : a + step, None], k_pos)
        scores = scores.masked_fill(~seen, float("-inf"))
        # a row that sees nothing is NaN here and adds nothing
        mass += torch.softmax(scores, -1, dtype=wide).nan_to_num(0.0).sum(2)
    return mass
