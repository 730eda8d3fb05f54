"""Key mass on a GPU: each row's total in one pass over the keys, each key's sum in one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core.call import Call
from saccade.kernels.here import here
from saccade.kernels.select.triton_block_mass import LOG2_E, logits, row_totals

TILE = 64  # rows and keys of a tile


@here
def key_mass(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """As `saccade.kernels.mass.key_mass`, for a contiguous call, in float32."""
    B, H, G, N, M = call.shape
    totals = torch.empty((B, H, N), dtype=torch.float32, device=q.device)
    mass = torch.empty((B, H, M), dtype=torch.float32, device=q.device)
    for kernel, out, count in ((_totals, totals, N), (_columns, mass, M)):
        kernel[(triton.cdiv(count, TILE), B * H)](
            q,
            k,
            totals,
            out,
            *q.stride(),
            *k.stride(),
            H,
            H // G,
            N,
            M,
            call.offset,
            q.shape[3],
            call.softmax_scale(q.shape[3]) * LOG2_E,
            TILE=TILE,
            WIDTH=max(16, triton.next_power_of_2(q.shape[3])),
            CAUSAL=call.causal,
            num_warps=4,
        )
    return mass


@triton.jit(do_not_specialize=["H", "share", "N", "M", "offset"])
def _totals(
    q,
    k,
    totals,
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
    D,
    scale,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    at, line = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = line // H, line % H
    rows, width = at * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    at_q = q + b * qb + h * qh + rows[:, None].to(tl.int64) * qn + width[None, :] * qd
    left = tl.load(at_q, mask=(rows < N)[:, None] & (width < D)[None, :], other=0.0)
    at_k = k + b * kb + h // share * kh + width[:, None] * kd
    end = M
    if CAUSAL:
        end = tl.minimum(M, offset + tl.minimum((at + 1) * TILE, N))
    total = row_totals(left, at_k, kn, offset + rows, M, tl.cdiv(end, TILE), D, scale, width, TILE, TILE, TILE, CAUSAL)
    tl.store(out + line * N + rows, total, mask=rows < N)


@triton.jit(do_not_specialize=["H", "share", "N", "M", "offset"])
def _columns(
    q,
    k,
    totals,
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
    D,
    scale,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    # the first keys are seen by the most rows: they come first
    at, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = line // H, line % H
    columns, inside, width = at * TILE + tl.arange(0, TILE), tl.arange(0, TILE), tl.arange(0, WIDTH)
    at_k = k + b * kb + h // share * kh + width[:, None] * kd
    first = 0
    if CAUSAL:
        first = tl.maximum(at * TILE - offset, 0) // TILE
    mass = tl.zeros([TILE], tl.float32)
    for step in range(first, tl.cdiv(N, TILE)):
        rows = step * TILE + inside
        at_q = q + b * qb + h * qh + rows[:, None].to(tl.int64) * qn + width[None, :] * qd
        left = tl.load(at_q, mask=(rows < N)[:, None] & (width < D)[None, :], other=0.0)
        total = tl.load(totals + line * N + rows, mask=rows < N, other=0.0)
        score = logits(left, at_k, kn, columns, offset + rows, D, scale, columns < M, width, CAUSAL)
        mass += tl.sum(tl.where((rows < N)[:, None], tl.exp2(score - total[:, None]), 0.0), 0)
    tl.store(out + line * M + columns, mass, mask=columns < M)
