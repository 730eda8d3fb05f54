"""Vertical-slash on a GPU: two passes over the scores of the last queries, and one write of the lists.

The scores of a few heads, 64 rows of them each, lie in a scratch of bounded size. A sum along an offset is then a sum
over rows that are read one place further left each, which costs no more than a sum over columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core.call import Call
from saccade.kernels.here import here
from saccade.kernels.select import SCRATCH


@here
def column_and_offset_mass(q: Tensor, k: Tensor, call: Call, last: int) -> tuple[Tensor, Tensor]:
    """As `saccade.kernels.select.vertical_slash.column_and_offset_mass`."""
    B, H, G, N, M = call.shape
    L = min(last, N)
    rows = max(16, triton.next_power_of_2(L))
    tail = q[:, :, N - L :]
    column = torch.empty((B, H, M), dtype=torch.float32, device=q.device)
    offset = torch.empty_like(column)
    # queries and keys of a tile must fit into the shared memory of small GPUs; wide float32 tiles compile for long
    tile = 32 if q.element_size() == 4 else 128 if q.shape[3] <= 128 else 64
    step = max(1, min(B * H, SCRATCH // (L * M)))
    scores = torch.empty((step, L, M), dtype=torch.float32, device=q.device)
    parts = torch.empty((step, triton.cdiv(M, tile), rows), dtype=torch.float32, device=q.device)
    for a in range(0, B * H, step):
        n = min(step, B * H - a)
        _scores[(triton.cdiv(M, tile) * n,)](
            tail,
            k,
            scores,
            parts,
            *tail.stride(),
            *k.stride(),
            a,
            n,
            H,
            H // G,
            L,
            M,
            q.shape[3],
            call.softmax_scale(q.shape[3]),
            ROWS=rows,
            COLUMNS=tile,
            WIDTH=max(16, triton.next_power_of_2(q.shape[3])),
            num_warps=4,
        )
        total = torch.logsumexp(parts[:n], 1)
        _sums[(triton.cdiv(M, 128), n)](
            scores, total, column, offset, a, L, M, ROWS=rows, STEP=16, COLUMNS=128, num_warps=4
        )
    return column, offset


@triton.jit(do_not_specialize=["first", "heads", "M"])
def _scores(
    q,
    k,
    scores,
    parts,
    qb,
    qh,
    qn,
    qd,
    kb,
    kh,
    kn,
    kd,
    first,
    heads,
    H,
    share,
    L,
    M,
    D,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # heads that share keys come one after the other, so that the keys are in cache
    at, tile = tl.program_id(0) % heads, tl.program_id(0) // heads
    line = (first + at).to(tl.int64)
    b, h = line // H, line % H
    rows, columns, width = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    at_q = q + b * qb + h * qh + rows[:, None].to(tl.int64) * qn + width[None, :] * qd
    at_k = k + b * kb + h // share * kh + columns[None, :].to(tl.int64) * kn + width[:, None] * kd
    left = tl.load(at_q, mask=(rows < L)[:, None] & (width < D)[None, :], other=0.0)
    right = tl.load(at_k, mask=(columns < M)[None, :] & (width < D)[:, None], other=0.0)
    score = tl.dot(left, right, input_precision="ieee") * scale
    seen = columns[None, :] <= (M - L + rows)[:, None]
    score = tl.where(seen, score, float("-inf"))
    out = scores + at.to(tl.int64) * L * M + rows[:, None].to(tl.int64) * M + columns[None, :]
    tl.store(out, score, mask=(rows < L)[:, None] & (columns < M)[None, :])
    most = tl.max(tl.where(columns[None, :] < M, score, float("-inf")), 1)
    # a row that sees nothing of the tile has no sum
    some = tl.where(most > float("-inf"), most, 0.0)
    total = tl.sum(tl.where((columns < M)[None, :], tl.exp(score - some[:, None]), 0.0), 1)
    tiles = tl.num_programs(0) // heads
    mass = tl.where(total > 0.0, some + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(parts + (at.to(tl.int64) * tiles + tile) * ROWS + rows, mass)


@triton.jit(do_not_specialize=["first", "M"])
def _sums(scores, total, column, offset, first, L, M, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    straight = tl.zeros([COLUMNS], tl.float32)
    slanted = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, ROWS, STEP):
        rows = start + tl.arange(0, STEP)
        real = (rows < L)[:, None]
        mass = tl.load(total + at * ROWS + rows)[:, None]
        base = scores + at * L * M + rows[:, None].to(tl.int64) * M
        score = tl.load(base + place[None, :], mask=real & (place < M)[None, :], other=float("-inf"))
        straight += tl.sum(tl.exp(score - mass), 0)
        # the last row sees offset M-1-place at `place`, the row above it one key further left
        key = place[None, :] - (L - 1 - rows)[:, None]
        score = tl.load(base + key, mask=real & (key >= 0) & (key < M), other=float("-inf"))
        slanted += tl.sum(tl.exp(score - mass), 0)
    out = (first + at) * M
    tl.store(column + out + place, straight, mask=place < M)
    tl.store(offset + out + (M - 1 - place), slanted, mask=place < M)


@here
def shifted(steps: Tensor, top: int, call: Call, block: int) -> Tensor:
    """The key blocks of every query block [B,H,query blocks,K], ascending, from the steps [B,H,K] that all take."""
    B, H, K = steps.shape
    nq, nk = -(-call.shape.N // block), -(-call.shape.M // block)
    index = torch.empty((B, H, nq, K), dtype=torch.int32, device=steps.device)
    width = triton.next_power_of_2(K)
    warps = max(1, min(16, width // 512))
    _shifted[(B * H * nq,)](steps, index, *steps.stride(), H, nq, nk, K, top, WIDTH=width, num_warps=warps)
    return index


@triton.jit(do_not_specialize=["H", "nq", "nk", "K", "top"])
def _shifted(steps, index, sb, sh, sk, H, nq, nk, K, top, WIDTH: tl.constexpr):
    line, row = tl.program_id(0) // nq, tl.program_id(0) % nq
    at = tl.arange(0, WIDTH)
    base = steps + (line // H).to(tl.int64) * sb + (line % H).to(tl.int64) * sh
    step = tl.load(base + at * sk, mask=at < K, other=2147483647)
    # early rows are too near to the start for the last of the steps
    count = tl.sum((step <= top + row).to(tl.int32), 0)
    # the last query block may be short and end before its last entry begins
    block = tl.where(top + row - step < nk, top + row - step, -1)
    place = tl.where(at < count, count - 1 - at, at)
    out = index + tl.program_id(0).to(tl.int64) * K
    tl.store(out + place, tl.where(at < count, block, -1), mask=at < K)
