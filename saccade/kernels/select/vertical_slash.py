"""Vertical-slash: what the last queries look at, by key and by offset, and the key blocks that kept offsets touch.

MInference (Jiang et al. 2024, arXiv 2407.02490, github.com/microsoft/MInference). Plain PyTorch here; on a GPU the two
steps that are more than a few small tensors go through `triton_vertical_slash`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Blocks
from saccade.kernels.select import kernels_serve, on_gpu

MOST = 128  # queries that the kernel estimates from at once


def column_and_offset_mass(q: Tensor, k: Tensor, call: Call, last: int) -> tuple[Tensor, Tensor]:
    """Softmax mass of the last queries per key [B,H,M] and per offset i-j [B,H,M], float32 or wider.

    Args:
        q: queries [B,H,N,D].
        k: keys [B,G,M,D].
        call: a contiguous, causal call.
        last: queries at the end that are looked at.
    """
    if last <= MOST and on_gpu(q, k, width=q.shape[3]):
        from saccade.kernels.select import triton_vertical_slash

        return triton_vertical_slash.column_and_offset_mass(q, k, call, last)
    return _mass(q, k, call, last)


def diagonal_blocks(offsets: Tensor, call: Call, block: int) -> Blocks:
    """All blocks that hold a pair (i, j) with i-j among the offsets [B,H,S]; offset 0 must be one of them, -1 is none.

    A list is as long as the offsets of some head need on a CPU, and as long as they could need on a GPU, where asking
    would make the host wait.
    """
    steps, top = _steps(offsets, call, block)
    if offsets.is_cuda:
        K = min(steps.shape[2], 2 * offsets.shape[2])
        if kernels_serve(offsets):
            from saccade.kernels.select import triton_vertical_slash

            return Blocks(triton_vertical_slash.shifted(steps[..., :K], top, call, block), block, block)
    else:
        K = int((steps < steps.shape[2]).sum(-1).amax())
    return Blocks(_shifted(steps[..., :K], top, call, block), block, block)


def _mass(q: Tensor, k: Tensor, call: Call, last: int) -> tuple[Tensor, Tensor]:
    B, H, G, N, M = call.shape
    L = min(last, N)
    rows = q[:, :, N - L :] * call.softmax_scale(q.shape[3])
    scores = (rows.reshape(B, G, -1, q.shape[3]) @ k.transpose(-1, -2)).view(B, H, L, M)
    future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    scores[..., M - L :].masked_fill_(future, float("-inf"))
    probs = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))
    # keys from last to first, then each row one place further right than the row above: offsets stand in columns
    skewed = torch.nn.functional.pad(probs.flip(-1), (0, L)).flatten(2)[..., : L * (M + L - 1)]
    return probs.sum(2), skewed.reshape(B, H, L, M + L - 1).sum(2)[..., L - 1 :]


def _steps(offsets: Tensor, call: Call, block: int) -> tuple[Tensor, int]:
    """How many key blocks to the left of the last row's own a touched one lies, ascending, int32 [B,H,all steps].

    An offset lies as many key blocks to the left of every query block. Places that are left over hold the number of
    steps. The second result is the key block of the first query block's last row.
    """
    start = call.offset
    top = (start + block - 1) // block
    none = top - (start - call.shape.M + 1) // block + 1
    offsets = offsets.where(offsets >= 0, 0).long()
    low = (start - offsets).div(block, rounding_mode="floor")
    high = (start + block - 1 - offsets).div(block, rounding_mode="floor")
    met = torch.zeros((*offsets.shape[:2], none), dtype=torch.bool, device=offsets.device)
    met.scatter_(2, top - low, True).scatter_(2, top - high, True)
    steps = torch.arange(none, dtype=torch.int32, device=offsets.device)
    return torch.where(met, steps, none).sort(-1).values, top


def _shifted(steps: Tensor, top: int, call: Call, block: int) -> Tensor:
    """The key blocks of every query block [B,H,query blocks,K], ascending, from the steps [B,H,K] that all take."""
    K, device = steps.shape[2], steps.device
    nq, nk = -(-call.shape.N // block), -(-call.shape.M // block)
    own = torch.arange(top, top + nq, dtype=torch.int32, device=device)
    # early rows are too near to the start for the last of the steps
    count = torch.searchsorted(steps.contiguous(), own.expand(*steps.shape[:2], -1).contiguous(), right=True)
    farthest = count[..., None] - 1 - torch.arange(K, device=device)
    step = steps[:, :, None].expand(-1, -1, nq, -1).gather(3, farthest.clamp_min(0))
    index = torch.where(farthest < 0, -1, own[:, None] - step)
    if top + nq - 1 >= nk:
        # the last query block is short and ends before its last entry begins
        last = index[:, :, -1]
        last.masked_fill_(last >= nk, -1)
    return index
