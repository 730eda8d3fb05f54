"""Block mass on a GPU: two passes over a query block's keys, one for each row's total and one for the sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core.call import Call
from saccade.kernels.here import here

LOG2_E = 1.4426950408889634


@here
def block_mass(q: Tensor, k: Tensor, call: Call, block_q: int, block_k: int) -> Tensor:
    """As `saccade.kernels.select.block_mass.block_mass`, in float32."""
    B, H, G, N, M = call.shape
    nq, nk = triton.cdiv(N, block_q), triton.cdiv(M, block_k)
    out = torch.zeros((B, H, nq, nk), dtype=torch.float32, device=q.device)
    _mass[(nq, B * H)](
        q,
        k,
        out,
        *q.stride(),
        *k.stride(),
        H,
        H // G,
        N,
        M,
        call.offset,
        nk,
        q.shape[3],
        call.softmax_scale(q.shape[3]) * LOG2_E,
        QUERIES=block_q,
        KEYS=block_k,
        ROWS=max(16, triton.next_power_of_2(block_q)),
        COLUMNS=max(16, triton.next_power_of_2(block_k)),
        WIDTH=max(16, triton.next_power_of_2(q.shape[3])),
        CAUSAL=call.causal,
        num_warps=4,
    )
    return out


@triton.jit
def logits(left, at_k, kn, columns, positions, D, scale, real, width, CAUSAL: tl.constexpr):
    """Logits of a tile in base 2; -inf where a key is not there, or comes after the row's position."""
    right = tl.load(at_k + columns[None, :].to(tl.int64) * kn, mask=real[None, :] & (width < D)[:, None], other=0.0)
    score = tl.dot(left, right, input_precision="ieee") * scale
    seen = real[None, :]
    if CAUSAL:
        seen = seen & (columns[None, :] <= positions[:, None])
    return tl.where(seen, score, float("-inf"))


@triton.jit
def row_totals(
    left,
    at_k,
    kn,
    positions,
    M,
    blocks,
    D,
    scale,
    width,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """log2 of the sum of each row's weights over so many key blocks; 0 for a row that sees nothing."""
    inside = tl.arange(0, COLUMNS)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for block in range(0, blocks):
        columns = block * KEYS + inside
        score = logits(left, at_k, kn, columns, positions, D, scale, (inside < KEYS) & (columns < M), width, CAUSAL)
        now = tl.maximum(most, tl.max(score, 1))
        # a row that has seen nothing yet has no maximum to compare with
        safe = tl.where(now > float("-inf"), now, 0.0)
        total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(score - safe[:, None]), 1)
        most = now
    return tl.where(most > float("-inf"), most + tl.log2(total), 0.0)


@triton.jit(do_not_specialize=["H", "share", "N", "M", "offset", "nk"])
def _mass(
    q,
    k,
    out,
    qb,
    qh,
    qn,
    qd,
    kb,
    kh,
    kn,
    kd,
    H,
    share,
    N,
    M,
    offset,
    nk,
    D,
    scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    # the last query blocks have the most keys: they come first
    at, line = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = line // H, line % H
    rows, inside, width = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    first = at * QUERIES
    mine = (rows < QUERIES) & (first + rows < N)
    at_q = q + b * qb + h * qh + (first + rows)[:, None].to(tl.int64) * qn + width[None, :] * qd
    left = tl.load(at_q, mask=mine[:, None] & (width < D)[None, :], other=0.0)
    at_k = k + b * kb + h // share * kh + width[:, None] * kd
    end = M
    if CAUSAL:
        end = tl.minimum(M, offset + tl.minimum(first + QUERIES, N))
    blocks, positions = tl.cdiv(end, KEYS), offset + first + rows
    total = row_totals(left, at_k, kn, positions, M, blocks, D, scale, width, KEYS, ROWS, COLUMNS, CAUSAL)
    to = out + (line * tl.num_programs(0) + at) * nk
    for block in range(0, blocks):
        columns = block * KEYS + inside
        score = logits(left, at_k, kn, columns, positions, D, scale, (inside < KEYS) & (columns < M), width, CAUSAL)
        weight = tl.where(mine[:, None], tl.exp2(score - total[:, None]), 0.0)
        tl.store(to + block, tl.sum(tl.sum(weight, 1), 0))
