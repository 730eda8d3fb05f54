"""The largest entries of rows, ascending by index: the k-th largest value by bisection, then one pass that writes.

Scores become integers in the same order, and the range between the smallest and the largest is halved until exactly as
many as wanted lie above. No sort, no host; where values tie, the lowest index wins.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core.call import Call
from saccade.kernels.here import here

LONGEST = 1 << 16  # entries of a row that are held at once
SHORTEST = 1 << 14  # entries of a piece of a row that is longer
TILE = 1 << 9  # entries that a program holds where rows are short


def top_lines(scores: Tensor, count: int, block_q: int, block_k: int, call: Call, first: int = 0) -> Tensor | None:
    """The largest visible key blocks of query blocks `first`, `first` + 1, ...: scores [B,H,n,m] -> int32 [B,H,n,K].

    K = min(count, key blocks of the call); scores of key blocks from m on are not asked for. None where rows are too
    long to be held.
    """
    B, H, n, m = scores.shape
    if m > LONGEST:
        return None
    K = min(count, -(-call.shape.M // block_k))
    index = torch.empty((B, H, n, K), dtype=torch.int32, device=scores.device)
    rule = (block_q, block_k, call.shape.N, call.offset, first)
    _launch(scores, scores.stride(), index, m, length=m, causal=call.causal, rule=rule)
    return index


def largest(scores: Tensor, count: int) -> Tensor | None:
    """The largest entries of each row [B,H,m] -> int32 [B,H,min(count,m)], ascending, -1 where fewer are above -inf.

    A long row is cut into pieces: what is among its largest is among its piece's largest. None where that leaves too
    many.
    """
    B, H, m = scores.shape
    if m <= LONGEST:
        index = torch.empty((B, H, 1, min(count, m)), dtype=torch.int32, device=scores.device)
        _launch(scores, (*scores.stride()[:2], 0, scores.stride(2)), index, m, length=m)
        return index[:, :, 0]
    piece = max(SHORTEST, triton.next_power_of_2(2 * count))
    if piece > LONGEST:
        return None
    parts = triton.cdiv(m, piece)
    index = torch.empty((B, H, parts, count), dtype=torch.int32, device=scores.device)
    sb, sh, sm = scores.stride()
    _launch(scores, (sb, sh, piece * sm, sm), index, piece, length=m, hop=piece)
    starts = torch.arange(0, m, piece, dtype=torch.int32, device=scores.device)[:, None]
    index = torch.where(index < 0, -1, index + starts).flatten(2)
    values = scores.gather(2, index.clamp_min(0).long()).masked_fill(index < 0, float("-inf"))
    # still ascending, so that the lowest index wins again
    best = largest(values, count)
    return None if best is None else torch.where(best < 0, -1, index.gather(2, best.clamp_min(0).long()))


@here
def _launch(
    scores: Tensor,
    strides: tuple[int, ...],
    index: Tensor,
    m: int,
    length: int,
    hop: int = 0,
    causal: bool = False,
    rule: tuple[int, ...] = (1, 1, 1, 0, 0),
) -> None:
    """Lines [B,H,n] of at most m scores each; line i holds what is left of `length` from i * hop on."""
    B, H, n, K = index.shape
    width = triton.next_power_of_2(max(m, 16))
    rows = max(1, min(TILE // width, triton.next_power_of_2(n)))
    _largest[(B * H * triton.cdiv(n, rows),)](
        scores,
        index,
        *strides,
        H,
        n,
        m,
        K,
        length,
        hop,
        *rule,
        CAUSAL=causal,
        ROWS=rows,
        WIDTH=width,
        LIST=triton.next_power_of_2(K),
        num_warps=max(1, min(32, width // 1024)),
    )


@triton.jit(do_not_specialize=["H", "n", "m", "K", "length", "hop", "block_q", "block_k", "N", "offset", "first"])
def _largest(
    scores,
    index,
    sb,
    sh,
    sn,
    sm,
    H,
    n,
    m,
    K,
    length,
    hop,
    block_q,
    block_k,
    N,
    offset,
    first,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LIST: tl.constexpr,
):
    tiles = tl.cdiv(n, ROWS)
    line, rows = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    # the last piece of a row may be short
    seen = tl.minimum(length - rows * hop, m)
    if CAUSAL:
        end = tl.minimum((first + rows + 1) * block_q, N) + offset
        seen = tl.minimum(seen, (end + block_k - 1) // block_k)
    base = scores + (line // H).to(tl.int64) * sb + (line % H).to(tl.int64) * sh
    real = (rows < n)[:, None] & (at[None, :] < seen[:, None])
    value = tl.load(
        base + rows[:, None].to(tl.int64) * sn + at[None, :].to(tl.int64) * sm, mask=real, other=float("-inf")
    )
    # the bits of a float, read as an integer, are in its order once negative ones are turned round; -0 is 0
    value = value.to(tl.float32)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    real = real & (value > float("-inf"))
    key = tl.where(real, key, -2147483648)
    wanted = tl.minimum(tl.sum(real.to(tl.int32), 1), K)
    high = tl.max(key, 1).to(tl.int64)
    low = tl.min(tl.where(real, key, 2147483647), 1).to(tl.int64)
    low = tl.minimum(low, high)
    # at least as many as wanted are at `low` or above, fewer above `high`
    while tl.max(high - low, 0) > 0:
        middle = low + (high - low + 1) // 2
        found = tl.sum((key >= middle[:, None].to(tl.int32)).to(tl.int32), 1)
        enough = found >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        high = tl.where(found == wanted, low, high)
    edge = low[:, None].to(tl.int32)
    above = real & (key > edge)
    equal = real & (key == edge)
    spare = wanted - tl.sum(above.to(tl.int32), 1)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 1) <= spare[:, None]))
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    out = index + (line.to(tl.int64) * n + rows[:, None]) * K
    tl.store(out + place, tl.broadcast_to(at[None, :], [ROWS, WIDTH]), mask=chosen)
    slots = tl.arange(0, LIST)[None, :]
    empty = (rows < n)[:, None] & (slots >= wanted[:, None]) & (slots < K)
    tl.store(out + slots, tl.full([ROWS, LIST], -1, tl.int32), mask=empty)


@here
def products(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    first: int,
    block_q: int,
    block_k: int,
    call: Call,
    sink: int = 0,
    forced: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write q [B,H,n,D] times k [B,G,m,D] to out [B,H,n,m'], m' <= m, float32; +inf where a key block is forced in.

    Tiles that causality hides whole are left as they are.
    """
    B, H, n, D = q.shape
    m = out.shape[3]
    lo, hi = (q, q) if forced is None else forced
    half = q.dtype != torch.float32
    rows, columns = (64, 128) if half and D <= 128 else (32, 64)
    _products[(triton.cdiv(n, rows) * triton.cdiv(m, columns), B * H)](
        q,
        k,
        out,
        lo,
        hi,
        *q.stride(),
        *k.stride(),
        *out.stride()[:3],
        H,
        H // k.shape[1],
        n,
        m,
        D,
        first,
        block_q,
        block_k,
        call.shape.N,
        call.offset,
        sink,
        CAUSAL=call.causal,
        FORCED=forced is not None,
        ROWS=rows,
        COLUMNS=columns,
        WIDTH=max(16, triton.next_power_of_2(D)),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["n", "m", "first", "block_q", "block_k", "N", "offset", "sink"])
def _products(
    q,
    k,
    out,
    lo,
    hi,
    qb,
    qh,
    qn,
    qd,
    kb,
    kh,
    kn,
    kd,
    ob,
    oh,
    on,
    H,
    share,
    n,
    m,
    D,
    first,
    block_q,
    block_k,
    N,
    offset,
    sink,
    CAUSAL: tl.constexpr,
    FORCED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    wide = tl.cdiv(m, COLUMNS)
    rows = tl.program_id(0) // wide * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % wide * COLUMNS + tl.arange(0, COLUMNS)
    line = tl.program_id(1).to(tl.int64)
    b, h = line // H, line % H
    begins = tl.program_id(0) % wide * COLUMNS * block_k
    ends = tl.minimum((first + tl.program_id(0) // wide * ROWS + ROWS) * block_q, N) + offset
    # what causality hides whole is not asked for
    if begins < ends or not CAUSAL:
        width = tl.arange(0, WIDTH)
        at_q = q + b * qb + h * qh + rows[:, None].to(tl.int64) * qn + width[None, :] * qd
        at_k = k + b * kb + h // share * kh + columns[None, :].to(tl.int64) * kn + width[:, None] * kd
        left = tl.load(at_q, mask=(rows < n)[:, None] & (width < D)[None, :], other=0.0)
        right = tl.load(at_k, mask=(columns < m)[None, :] & (width < D)[:, None], other=0.0)
        score = tl.dot(left, right, input_precision="ieee")
        must = (columns < sink)[None, :]
        if FORCED:
            begin = tl.load(lo + first + rows, mask=rows < n, other=0)
            end = tl.load(hi + first + rows, mask=rows < n, other=0)
            must = must | ((columns[None, :] >= begin[:, None]) & (columns[None, :] < end[:, None]))
        score = tl.where(must, float("inf"), score)
        at = out + b * ob + h * oh + rows[:, None].to(tl.int64) * on + columns[None, :]
        tl.store(at, score, mask=(rows < n)[:, None] & (columns < m)[None, :])
