"""Rows of queries against blocks, windows and single tokens: one launch for a layer, whatever mixture its heads have.

The online softmax of FlashAttention (arXiv 2205.14135, 2307.08691; github.com/Dao-AILab/flash-attention) over lists of
key tiles. A program owns a tile of queries. Key tiles that all of its rows see whole run in one pipelined loop without
a mask; the edges (diagonal, ends of a window, where a listed block and a window overlap) run in a masked loop, and
single tokens are gathered. Positions that are given, instead of slot = position, mask every tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.core.call import Call
from saccade.core.pattern import Pattern
from saccade.kernels.attend import triton_backward
from saccade.kernels.attend.lower import Lowered, lower, unlisted
from saccade.kernels.attend.tile import training
from saccade.kernels.here import here
from saccade.kernels.merge import Out

LOG2E = 1.4426950408889634
WIDEST = 256  # of heads
# bytes of shared memory that the measured tiles need; GPUs with less take a smaller tile
ROOM, WIDE_ROOM = 160 << 10, 225 << 10


class Tile(NamedTuple):
    """How a program is cut: query rows, keys at a time, warps, key tiles in flight, registers of a thread."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def refuses(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None) -> str | None:
    """Why this kernel does not serve the call; None where it does."""
    if q.dtype not in {torch.float16, torch.bfloat16, torch.float32}:
        return f"it computes in float16, bfloat16 or float32, the tensors are {q.dtype}"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"heads are {q.shape[3]} wide (values {v.shape[3]}), at most {WIDEST} are served"
    strange = unlisted(pattern)
    if strange is not None:
        return f"{strange} has no lists of blocks, windows or tokens"
    if training(q, k, v, bias):
        return triton_backward.refuses_gradients(q, k, v, pattern, call, bias)
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None, lse: bool) -> Out:
    """As `saccade.kernels.attend.attend`."""
    lowered = lower(pattern, call, q.device)
    if training(q, k, v, bias):
        return triton_backward.attend_with_gradients(q, k, v, lowered, call, bias)
    return launch(q, k, v, lowered, call, bias, lse)


@here
def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lowered: Lowered,
    call: Call,
    bias: Tensor | None,
    lse: bool = True,
    tile: Tile | None = None,
) -> Out:
    """One launch over a lowered pattern.

    Args:
        q, k, v, call, bias, lse: as in `attend`.
        lowered: the pattern's tensors.
        tile: how programs are cut; None takes the measured choice.
    """
    B, H, G, N, M = call.shape
    D, DV = q.shape[3], v.shape[3]
    scale = call.softmax_scale(D)
    if scale < 0:
        # the running maximum is taken before the scale
        q, scale = -q, -scale
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    if tile is None and _on_hopper(q):
        from saccade.kernels.attend import triton_hopper

        if triton_hopper.serves(q, k, v, lowered, call, bias):
            return triton_hopper.launch(q, k, v, lowered, call, scale, lse)
    o = torch.empty((B, H, N, DV), dtype=q.dtype, device=q.device)
    sums = torch.empty((B, H, N), dtype=torch.float32, device=q.device) if lse else None
    masked = bias is not None or call.q_pos is not None
    tile = _choose(lowered, max(D, DV), q.dtype, masked) if tile is None else tile
    L = lowered.lists
    own_bias = bias is not None and bias.shape[1] > G
    R, P = cut(lowered.block_q, tile.rows, 1 if own_bias else math.gcd(H // L, H // G))
    keys, whole = _keys(lowered, tile.keys)
    HD, HDV = (max(16, triton.next_power_of_2(d)) for d in (D, DV))
    tma = all(copies(t) for t in (q, k, v, o))
    exact = lowered.block_q % R == 0
    tiles = -(-lowered.block_q // R)
    lines = -(-N // lowered.block_q)
    index, count, tokens = lowered.index, lowered.count, lowered.tokens
    q_pos, k_pos = (None if t is None else t.to(q.device).int() for t in (call.q_pos, call.k_pos))
    none = lowered.sink
    bias = None if bias is None else (bias if bias.stride(2) == 1 else bias.contiguous())
    kernel: Any = _forward
    kernel[(lines * tiles * B * (H // P),)](
        _window(q, P, R, HD) if tma else q,
        _window(k, 1, keys, HD) if tma else k,
        _window(v, 1, keys, HDV) if tma else v,
        _window(o, P, R, HDV) if tma and exact else o,
        none if sums is None else sums,
        k,
        v,
        none if bias is None else bias,
        none if q_pos is None else q_pos,
        none if k_pos is None else k_pos,
        none if index is None else index,
        none if count is None else count,
        lowered.sink,
        lowered.recent,
        none if tokens is None else tokens,
        *strides(q, 3),
        *strides(k, 3),
        *strides(v, 3),
        *strides(bias, 2),
        *strides(q_pos, 1),
        *strides(k_pos, 2),
        *strides(index, 3),
        *strides(tokens, 3),
        0 if count is None or count.shape[0] == 1 else count.stride(0),
        scale * LOG2E,
        H,
        H // G,
        H // L,
        1 if bias is None else H // bias.shape[1],
        N,
        M,
        M - N,
        lines,
        lowered.block_q,
        lowered.block_k,
        0 if tokens is None else tokens.shape[3],
        D=D,
        DV=DV,
        HD=HD,
        HDV=HDV,
        R=R,
        P=P,
        BN=keys,
        TILES=tiles,
        SUBS=-(-lowered.block_k // keys),
        CAUSAL=call.causal,
        WINDOWS=lowered.windows,
        BLOCKS=index is not None,
        TOKENS=tokens is not None,
        POSITIONS=q_pos is not None,
        BIAS=bias is not None,
        WHOLE=whole,
        TMA=tma,
        STORE=tma and exact,
        LSE=lse,
        STAGES=tile.stages,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        maxnreg=tile.registers,
    )
    return Out(o, sums)


def _on_hopper(q: Tensor) -> bool:
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9


def _room(device: torch.device) -> int:
    """Bytes of shared memory that a program may take."""
    if device.type != "cuda":
        return WIDE_ROOM
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", WIDE_ROOM)


def _choose(lowered: Lowered, width: int, dtype: torch.dtype, masked: bool) -> Tile:
    """The tile for a width of heads, as measured on an H200. Limits on registers let programs share a processor."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 2)
    if _room(lowered.sink.device) < (ROOM if width <= 128 else WIDE_ROOM):
        return Tile(64, 32, 4, 2)
    if width <= 64:
        simple = lowered.tokens is None and not lowered.windows and not masked
        return Tile(64, 64, 4, 3, 96 if simple else None)
    if width <= 128:
        return Tile(128, 64, 8, 3) if lowered.windows or masked else Tile(128, 64, 8, 2, 128)
    return Tile(64, 64, 8, 2)


def cut(block_q: int, most: int, share: int) -> tuple[int, int]:
    """Rows and heads of a tile: heads that share their lists fill a tile that a query block leaves empty."""
    even = block_q & -block_q
    R = min(most, even if even >= 16 else triton.next_power_of_2(block_q))
    P = 1
    while share % (2 * P) == 0 and most >= 2 * P * R:
        P *= 2
    return max(R, 16 // P), P


def _keys(lowered: Lowered, most: int) -> tuple[int, bool]:
    """Keys of a tile, and whether such tiles fill a listed block."""
    if lowered.index is None:
        return most, True
    even = lowered.block_k & -lowered.block_k
    if even >= 16:
        return min(most, even), True
    return min(most, max(16, triton.next_power_of_2(lowered.block_k))), False


def copies(t: Tensor) -> bool:
    """Can the tensor copy engine read it? Rows of a multiple of 16 bytes, none of them twice."""
    rows = [s for s, n in zip(t.stride()[:3], t.shape[:3], strict=True) if n > 1]
    size = t.element_size()
    return t.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in rows)


def _window(t: Tensor, heads: int, rows: int, width: int) -> TensorDescriptor:
    """A descriptor that copies [1, heads, rows, width]; an axis of one has any stride that will do."""
    line = -(-t.shape[3] // 16) * 16
    strides = [s if n > 1 else line for s, n in zip(t.stride()[:3], t.shape[:3], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, heads, rows, width])


def strides(t: Tensor | None, axes: int) -> list[int]:
    """Strides with which an axis of one stays where it is."""
    if t is None:
        return [0] * axes
    return [s if n > 1 else 0 for s, n in zip(t.stride()[:axes], t.shape[:axes], strict=True)]


# fmt: off
@triton.jit
def _tile(t, base, b, h, start, stride, limit, width, ROWS: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Keys or values [ROWS, WIDTH] from a slot on, zero behind the last."""
    if TMA:
        return t.load([b, h, start, 0]).reshape(ROWS, WIDTH)
    else:
        rows = start + tl.arange(0, ROWS)
        cols = tl.arange(0, WIDTH)
        held = (rows[:, None] < limit) & (cols[None] < width)
        return tl.load(base + rows[:, None].to(tl.int64) * stride + cols[None], mask=held, other=0.0)


@triton.jit
def _update(
    q, keys, values, m, l, acc, scale, seen, extra, MASKED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):
    """One step of the online softmax, in powers of two: m is the maximum of scores * scale, l the sum of weights."""
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if MASKED or BIAS:
        s = s * scale
        if BIAS:
            s += extra[None, :]
        if MASKED:
            s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        # a row that has seen no key yet
        level = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - level[:, None])
        alpha = tl.exp2(m - level)
    else:
        top = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - top[:, None])
        alpha = tl.exp2(m - top)
    l = l * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    return top, l, acc


@triton.jit
def _visible(
    p, j, k_pos, sink, recent, real, until, LISTED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Which slots j the rows (p and real are columns) see in their window or, LISTED, in a list and in no window."""
    if POSITIONS:
        kp = tl.load(k_pos + j, mask=(j >= 0) & (j < until), other=-1)
        seen = (kp >= 0)[None, :] & real
    else:
        kp = j
        seen = ((j >= 0) & (j < until))[None, :] & real
    if CAUSAL:
        seen = seen & (kp[None, :] <= p)
    if WINDOWS:
        near = (kp[None, :] < sink) | (tl.abs(p - kp[None, :]) < recent)
        if LISTED:
            seen = seen & (near == 0)
        else:
            seen = seen & near
    return seen


@triton.jit
def _some(j, k_pos, until, low, high, sink, recent, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """May a row between positions low and high see one of the slots j? Judged by the ends of their positions."""
    kp = tl.load(k_pos + j, mask=j < until, other=-1)
    least = tl.min(tl.where(kp >= 0, kp, 1 << 30), 0)
    most = tl.max(kp, 0)
    some = (most >= 0) & (high >= 0)
    if CAUSAL:
        some = some & (least <= high)
    if WINDOW:
        some = some & ((least < sink) | ((most > low - recent) & (least < high + recent)))
    return some


@triton.jit(do_not_specialize=[
    "sqb", "sqh", "skb", "skh", "svb", "svh", "sbb", "sbh", "spb", "skpb", "skph", "sib", "sih", "siq", "stb", "sth",
    "stq", "scb", "H", "share", "list_share", "bias_share", "N", "M", "offset", "lines", "block_q", "block_k", "T",
])
def _forward(
    q, k, v, o, lse, k_ptr, v_ptr, bias, q_pos, k_pos, index, count, sinks, recents, tokens,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sbb, sbh, spb, skpb, skph, sib, sih, siq, stb, sth, stq, scb,
    scale, H, share, list_share, bias_share, N, M, offset, lines, block_q, block_k, T,
    D: tl.constexpr, DV: tl.constexpr, HD: tl.constexpr, HDV: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    BN: tl.constexpr, TILES: tl.constexpr, SUBS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWS: tl.constexpr,
    BLOCKS: tl.constexpr, TOKENS: tl.constexpr, POSITIONS: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr,
    TMA: tl.constexpr, STORE: tl.constexpr, LSE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):
    BM: tl.constexpr = P * R
    pid = tl.program_id(0)
    packs = share // P
    # the heads of a key head run side by side on the same rows, the longest rows first
    turn = lines * TILES - 1 - (pid // packs) % (lines * TILES)
    group = pid // (packs * lines * TILES)
    G = H // share
    b = group // G
    g = group % G
    h = g * share + (pid % packs) * P
    line = turn // TILES
    first = line * block_q + (turn % TILES) * R
    end = tl.minimum((line + 1) * block_q, N)
    if first >= end:
        return
    slot = tl.arange(0, BM)
    row = first + slot % R
    head = h + slot // R
    real = row < end
    low = first + offset
    high = tl.minimum(first + R, end) - 1 + offset
    b64, g64 = b.to(tl.int64), g.to(tl.int64)
    if POSITIONS:
        p = tl.load(q_pos + b64 * spb + row, mask=real, other=-1)
        real = p >= 0
        low = tl.min(tl.where(real, p, 1 << 30), 0)
        high = tl.max(p, 0)
        k_pos += b64 * skpb + g64 * skph
    else:
        p = row + offset

    # made once: Triton 3.6 cannot reuse in one loop what it made under an `if` in another
    p_column, real_column = p[:, None], real[:, None]
    k_ptr += b64 * skb + g64 * skh
    v_ptr += b64 * svb + g64 * svh
    if TMA:
        queries = q.load([b, h, first, 0]).reshape(BM, HD)
    else:
        cols = tl.arange(0, HD)
        at = q + b64 * sqb + head[:, None].to(tl.int64) * sqh + row[:, None].to(tl.int64) * sqn + cols[None]
        queries = tl.load(at, mask=(row < end)[:, None] & (cols < D)[None], other=0.0)
    if BIAS:
        # one bias for the tile: the heads of a tile that have their own are not packed
        bias += b64 * sbb + (h // bias_share).to(tl.int64) * sbh

    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, HDV], tl.float32)
    span = tl.arange(0, BN)
    nothing = span
    mine = h // list_share

    # tiles of the window: [0, ns) of the sink and [lo, hi) of the band; [0, nf) and [a, z) of them need no mask
    sink = 0
    recent = 0
    ns = 0
    nf = 0
    lo = 0
    hi = 0
    a = 0
    z = 0
    band = M
    if WINDOWS:
        sink = tl.load(sinks + mine)
        recent = tl.load(recents + mine)
        if POSITIONS:
            hi = tl.where(sink + recent > 0, tl.cdiv(M, BN), 0)
            z = 0
        else:
            limit = high + 1 if CAUSAL else M
            past = low + 1 if CAUSAL else M
            ns = tl.cdiv(tl.minimum(sink, limit), BN)
            if recent > 0:
                band = tl.maximum(low - recent + 1, 0)
                lo = band // BN
                hi = tl.cdiv(tl.minimum(tl.maximum(high + recent, sink), limit), BN)
                a = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(high - recent + 1, 0), BN), lo), hi)
                z = tl.minimum(tl.maximum(tl.minimum(low + recent, past) // BN, a), hi)
                ns = tl.minimum(ns, lo)
            nf = tl.minimum(ns, tl.minimum(sink, past) // BN)

        edges = (ns - nf) + (a - lo) + (hi - z)
        for i in range(0, edges):
            t = nf + i
            t = tl.where(t >= ns, t - ns + lo, t)
            if ns - nf + a - lo <= i:
                t = i - (ns - nf + a - lo) + z
            j = t * BN + span
            seen = _visible(p_column, j, k_pos, sink, recent, real_column, M, False, CAUSAL, True, POSITIONS)
            some = True
            if POSITIONS:
                some = _some(j, k_pos, M, low, high, sink, recent, True, CAUSAL)
            if some:
                keys = _tile(k, k_ptr, b, g, t * BN, skn, M, D, BN, HD, TMA)
                values = _tile(v, v_ptr, b, g, t * BN, svn, M, DV, BN, HDV, TMA)
                extra = nothing
                if BIAS:
                    extra = tl.load(bias + j, mask=j < M, other=0.0).to(tl.float32) * 1.4426950408889634
                m, l, acc = _update(queries, keys, values, m, l, acc, scale, seen, extra, True, BIAS, PRECISION)

    # listed blocks [f, s) of n lie outside the window and before the tile's first row
    n = 0
    f = 0
    s = 0
    if BLOCKS:
        index += b64 * sib + mine.to(tl.int64) * sih + line.to(tl.int64) * siq
        n = tl.load(count + b64 * scb + mine.to(tl.int64) * lines + line)
        if WHOLE and not POSITIONS:
            s = n
            past = low + 1 if CAUSAL else M
            past = tl.minimum(past, band)
            last = tl.load(index + s - 1, mask=s > 0, other=-1)
            while (last + 1) * block_k > past:
                s -= 1
                last = tl.load(index + s - 1, mask=s > 0, other=-1)
            if WINDOWS:
                early = tl.load(index, mask=s > 0, other=0)
                while (f < s) & (early * block_k < sink):
                    f += 1
                    early = tl.load(index + f, mask=f < s, other=0)
        for i in range(0, (f + n - s) * SUBS):
            e = i // SUBS
            e = tl.where(e >= f, e - f + s, e)
            block = tl.load(index + e)
            start = block * block_k + i % SUBS * BN
            j = start + span
            some = start < M
            if CAUSAL and not POSITIONS:
                some = start <= high
            if WINDOWS and not POSITIONS:
                some = some & (start + BN > nf * BN) & ((start < a * BN) | (start + BN > z * BN))
            until = tl.minimum((block + 1) * block_k, M)
            seen = _visible(p_column, j, k_pos, sink, recent, real_column, until, True, CAUSAL, WINDOWS, POSITIONS)
            if POSITIONS:
                some = some & _some(j, k_pos, until, low, high, sink, recent, False, CAUSAL)
            if some:
                keys = _tile(k, k_ptr, b, g, start, skn, M, D, BN, HD, TMA)
                values = _tile(v, v_ptr, b, g, start, svn, M, DV, BN, HDV, TMA)
                extra = nothing
                if BIAS:
                    extra = tl.load(bias + j, mask=j < M, other=0.0).to(tl.float32) * 1.4426950408889634
                m, l, acc = _update(queries, keys, values, m, l, acc, scale, seen, extra, True, BIAS, PRECISION)

    # what every row sees whole
    if WINDOWS or BLOCKS:
        inner = nf + z - a
        for i in tl.range(0, inner + (s - f) * SUBS, num_stages=STAGES):
            if WINDOWS and BLOCKS:
                listed = i >= inner
                block = tl.load(index + f + (i - inner) // SUBS, mask=listed, other=0)
                start = tl.where(i < nf, i, i - nf + a) * BN
                start = tl.where(listed, block * block_k + (i - inner) % SUBS * BN, start)
            elif WINDOWS:
                start = tl.where(i < nf, i, i - nf + a) * BN
            else:
                start = tl.load(index + i // SUBS) * block_k + i % SUBS * BN
            keys = _tile(k, k_ptr, b, g, start, skn, M, D, BN, HD, TMA)
            values = _tile(v, v_ptr, b, g, start, svn, M, DV, BN, HDV, TMA)
            extra = nothing
            if BIAS:
                extra = tl.load(bias + start + span).to(tl.float32) * 1.4426950408889634
            m, l, acc = _update(queries, keys, values, m, l, acc, scale, nothing, extra, False, BIAS, PRECISION)

    if TOKENS:
        tokens += b64 * stb + mine.to(tl.int64) * sth + line.to(tl.int64) * stq
        many = 0
        for i in range(0, T, 1024):
            place = i + tl.arange(0, 1024)
            j = tl.load(tokens + place, mask=place < T, other=-1)
            held = j >= 0
            if CAUSAL and not POSITIONS:
                held = held & (j <= high)
            many += tl.sum(held.to(tl.int32), 0)
        kc = tl.arange(0, HD)
        vc = tl.arange(0, HDV)
        for i in tl.range(0, many, BN, num_stages=STAGES):
            j = tl.load(tokens + i + span, mask=i + span < many, other=-1)
            far = tl.maximum(j, 0).to(tl.int64)[:, None]
            keys = tl.load(k_ptr + far * skn + kc[None], mask=(j >= 0)[:, None] & (kc < D)[None], other=0.0)
            values = tl.load(v_ptr + far * svn + vc[None], mask=(j >= 0)[:, None] & (vc < DV)[None], other=0.0)
            seen = _visible(p_column, j, k_pos, sink, recent, real_column, M, True, CAUSAL, WINDOWS, POSITIONS)
            extra = nothing
            if BIAS:
                extra = tl.load(bias + j, mask=j >= 0, other=0.0).to(tl.float32) * 1.4426950408889634
            m, l, acc = _update(queries, keys, values, m, l, acc, scale, seen, extra, True, BIAS, PRECISION)

    out = acc / tl.where(l > 0, l, 1.0)[:, None]
    if STORE:
        o.store([b, h, first, 0], out.to(o.dtype).reshape(1, P, R, HDV))
    else:
        vcols = tl.arange(0, HDV)
        where = ((b64 * H + head[:, None]) * N + row[:, None]) * DV + vcols[None]
        tl.store(o + where, out.to(o.dtype.element_ty), mask=(row < end)[:, None] & (vcols < DV)[None])
    if LSE:
        total = tl.where(l > 0, (m + tl.log2(tl.where(l > 0, l, 1.0))) * 0.6931471805599453, float("-inf"))
        tl.store(lse + (b64 * H + head) * N + row, total, mask=row < end)
