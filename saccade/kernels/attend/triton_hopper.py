"""The same rows against blocks and windows, written for Hopper: copies, matmuls and softmax run at the same time.

One warp group copies key and value tiles into rings of shared memory, two warp groups of 64 rows each take them from
there. A group issues the scores of the next tile and the values of this one, and computes its softmax while they run:
the schedule of FlashAttention-3 (arXiv 2407.08608; github.com/Dao-AILab/flash-attention), over lists of tiles.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from saccade.core.call import Call
from saccade.kernels.attend.lower import Lowered
from saccade.kernels.attend.triton_prefill import LOG2E, copies, cut, strides
from saccade.kernels.here import here
from saccade.kernels.merge import Out

ROWS = 128  # of a program, 64 for each of its two groups
DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


class Ring(NamedTuple):
    """How a program works: keys at a time, tiles in the rings, programs whose queries are held at once."""

    keys: int
    stages: int
    slots: int = 2


def serves(q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, call: Call, bias: Tensor | None) -> bool:
    """Is this the kernel for the call: half precision, whole blocks and windows, nothing to gather or add?"""
    if q.dtype not in DTYPES or bias is not None or lowered.tokens is not None or call.q_pos is not None:
        return False
    width = _width(q)
    if width not in (64, 128, 256) or width != _width(v) or (lowered.index is not None and lowered.block_k % 64):
        return False
    R, P = _cut(lowered, call)
    return lowered.block_q % R == 0 and R * P == ROWS and all(copies(t) for t in (q, k, v)) and _copied(v, q)


def _width(t: Tensor) -> int:
    return triton.next_power_of_2(t.shape[3])


def _copied(v: Tensor, q: Tensor) -> bool:
    """Can the output, dense and as wide as the values, be written by the copy engine?"""
    return v.shape[3] * q.element_size() % 16 == 0


def _cut(lowered: Lowered, call: Call) -> tuple[int, int]:
    _, H, G, _, _ = call.shape
    return cut(lowered.block_q, ROWS, math.gcd(H // lowered.lists, H // G))


@here
def launch(
    q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, call: Call, scale: float, lse: bool, ring: Ring | None = None
) -> Out:
    """As `triton_prefill.launch`, where `serves` says so."""
    B, H, G, N, M = call.shape
    o = torch.empty((B, H, N, v.shape[3]), dtype=q.dtype, device=q.device)
    sums = torch.empty((B, H, N), dtype=torch.float32, device=q.device) if lse else None
    width = _width(q)
    even = ROWS if lowered.index is None else lowered.block_k & -lowered.block_k
    ring = _choose(width, min(even, 128)) if ring is None else ring
    R, P = _cut(lowered, call)
    # a group's rows: half of the program's rows, or of its heads
    rows = min(R, 64)
    heads = 64 // rows
    tiles, lines = lowered.block_q // R, -(-N // lowered.block_q)
    programs = lines * tiles * B * (H // P)
    index, count, none = lowered.index, lowered.count, lowered.sink
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    kernel: Any = _forward
    kernel[(min(processors, programs),)](
        _window(q, heads, rows, width),
        _window(k, 1, ring.keys, width),
        _window(v, 1, ring.keys, width),
        _window(o, heads, rows, width),
        none if sums is None else sums,
        none if index is None else index,
        none if count is None else count,
        lowered.sink,
        lowered.recent,
        *strides(index, 3),
        0 if count is None or count.shape[0] == 1 else count.stride(0),
        *(programs, scale * LOG2E, H, H // G, H // lowered.lists, N, M, M - N),
        *(lines, lowered.block_q, lowered.block_k),
        HD=width,
        HDV=width,
        R=R,
        P=P,
        PH=heads,
        RH=rows,
        BN=ring.keys,
        TILES=tiles,
        SUBS=lowered.block_k // ring.keys,
        CAUSAL=call.causal,
        WINDOWS=lowered.windows,
        BLOCKS=index is not None,
        LSE=lse,
        STAGES=ring.stages,
        SLOTS=ring.slots,
        REGISTERS=232,
        num_warps=4,
    )
    return Out(o, sums)


def _choose(width: int, even: int) -> Ring:
    """As measured on an H200."""
    if width == 64:
        return Ring(even, 3 if even == 128 else 4)
    if width == 128:
        return Ring(128, 2) if even == 128 else Ring(64, 5)
    return Ring(64, 2, 1)


def _window(t: Tensor, heads: int, rows: int, width: int) -> TensorDescriptor:
    """A descriptor that copies [1, heads, rows, width]; an axis of one has any stride that will do."""
    line = -(-t.shape[3] // 16) * 16
    steps = [s if n > 1 else line for s, n in zip(t.stride()[:3], t.shape[:3], strict=True)]
    block = [1, heads, rows, width]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[t.dtype])
    return TensorDescriptor(t, list(t.shape), [*steps, 1], block, layout)


# their names until Triton 3.8
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.constexpr_function
def _products(columns):
    """The layout of a product of 64 rows by one warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _where(pid, packs, rows, H, share, TILES: gl.constexpr, P: gl.constexpr):
    """Batch row, key head, first query head, query block and tile in it of a program: the longest rows first."""
    turn = rows - 1 - (pid // packs) % rows
    group = pid // (packs * rows)
    G = H // share
    b = group // G
    g = group % G
    h = g * share + (pid % packs) * P
    return b, g, h, turn // TILES, turn % TILES


@gluon.jit
def _ends(first, until, R: gl.constexpr, N, offset):
    """Positions of a tile's first and last row."""
    high = gl.minimum(first + R, gl.minimum(until, N)) - 1 + offset
    return gl.minimum(first + offset, high), high


@gluon.jit
def _spans(low, high, M, sink, recent, BN: gl.constexpr, CAUSAL: gl.constexpr):
    """Key tiles that the window of rows low to high touches: [0, ns) of the sink and [lo, hi) of the band; of these
    [0, nf) and [a, z) need no mask. The band starts at slot `band`."""
    limit = high + 1 if CAUSAL else M
    past = low + 1 if CAUSAL else M
    ns = (gl.minimum(sink, limit) + BN - 1) // BN
    banded = recent > 0
    band = gl.where(banded, gl.maximum(low - recent + 1, 0), M)
    lo = gl.where(banded, band // BN, 0)
    hi = gl.where(banded, (gl.minimum(gl.maximum(high + recent, sink), limit) + BN - 1) // BN, 0)
    a = gl.minimum(gl.maximum((gl.maximum(high - recent + 1, 0) + BN - 1) // BN, lo), hi)
    z = gl.minimum(gl.maximum(gl.minimum(low + recent, past) // BN, a), hi)
    ns = gl.where(banded, gl.minimum(ns, lo), ns)
    nf = gl.minimum(ns, gl.minimum(sink, past) // BN)
    return ns, nf, lo, a, z, hi, band


@gluon.jit
def _tile(
    i,
    edges,
    f,
    s,
    ns,
    nf,
    lo,
    a,
    z,
    hi,
    index,
    block_k,
    SUBS: gl.constexpr,
    BN: gl.constexpr,
    WINDOWS: gl.constexpr,
    BLOCKS: gl.constexpr,
):
    """First slot of the i-th key tile, and whether a list names it: edges first, of the window and then of the list,
    then whole tiles, of the window and then of the list."""
    start = 0
    listed = True
    e = i
    if WINDOWS:
        sinks = ns - nf
        left = sinks + a - lo
        t = gl.where(i < sinks, i + nf, i - sinks + lo)
        t = gl.where(i < left, t, i - left + z)
        w = i - edges
        t = gl.where(w >= 0, gl.where(w < nf, w, w - nf + a), t)
        start = t * BN
        before = left + hi - z
        listed = gl.where(w >= 0, w >= nf + z - a, i >= before)
        e = gl.where(w >= 0, w - (nf + z - a) + edges, i - before)
        edges = edges - before
        e = gl.where(w >= 0, e - before, e)
    if BLOCKS:
        far = e >= edges
        sub = e - edges + f * SUBS
        near = gl.where(e < f * SUBS, e, e + (s - f) * SUBS)
        sub = gl.where(far, sub, near)
        if WINDOWS:
            block = gl.load(index + gl.maximum(sub, 0) // SUBS, mask=listed, other=0)
            start = gl.where(listed, gl.maximum(block, 0) * block_k + sub % SUBS * BN, start)
        else:
            start = gl.maximum(gl.load(index + sub // SUBS), 0) * block_k + sub % SUBS * BN
    return start, listed


@gluon.jit
def _seen(j, p, M, sink, recent, listed, CAUSAL: gl.constexpr, WINDOWS: gl.constexpr, BLOCKS: gl.constexpr):
    """Which slots of an edge tile the rows see: in their window, or in a list and in no window."""
    seen = (j < M)[None, :]
    if CAUSAL:
        seen = seen & (j[None, :] <= p[:, None])
    if WINDOWS:
        away = p[:, None] - j[None, :]
        near = (j < sink)[None, :] | ((away < recent) & (away > -recent))
        if BLOCKS:
            seen = seen & (near != listed)
        else:
            seen = seen & near
    return seen


# fmt: off
@gluon.jit
def _produce(
    q, k, v, qs, ks, vs, info, bars, lists, window, sizes,
    BN: gl.constexpr, SUBS: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, R: gl.constexpr, P: gl.constexpr,
    PH: gl.constexpr, RH: gl.constexpr, TILES: gl.constexpr, CAUSAL: gl.constexpr, WINDOWS: gl.constexpr,
    BLOCKS: gl.constexpr,
):
    """Copies the queries of a program, then key and value tiles as their places become free; runs ahead."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    told, q_ready, q_free, k_ready, v_ready, k_free, v_free, turns = bars
    index, count, sib, sih, siq, scb = lists
    sinks, recents = window
    programs, packs, rows, H, share, list_share, N, M, offset, lines, block_q, block_k = sizes
    c = 0
    t = 0
    for pid in range(gl.program_id(0), programs, gl.num_programs(0)):
        b, g, h, line, tile = _where(pid, packs, rows, H, share, TILES, P)
        first = line * block_q + tile * R
        mine = h // list_share
        low, high = _ends(first, (line + 1) * block_q, R, N, offset)
        sink, recent, ns, nf, lo, a, z, hi = 0, 0, 0, 0, 0, 0, 0, 0
        band = M
        if WINDOWS:
            sink = gl.load(sinks + mine)
            recent = gl.load(recents + mine)
            ns, nf, lo, a, z, hi, band = _spans(low, high, M, sink, recent, BN, CAUSAL)
        # listed blocks [f, s) of n lie outside the window and before the first row
        here = index
        n, s, f = 0, 0, 0
        if BLOCKS:
            b64 = b.to(gl.int64)
            here = index + b64 * sib + mine.to(gl.int64) * sih + line.to(gl.int64) * siq
            n = gl.load(count + b64 * scb + mine.to(gl.int64) * lines + line)
            s = n
            past = gl.minimum(low + 1 if CAUSAL else M, band)
            last = gl.load(here + s - 1, mask=s > 0, other=-1)
            while (last + 1) * block_k > past:
                s -= 1
                last = gl.load(here + s - 1, mask=s > 0, other=-1)
            if WINDOWS:
                early = gl.load(here, mask=s > 0, other=0)
                while (f < s) & (early * block_k < sink):
                    f += 1
                    early = gl.load(here + f, mask=f < s, other=0)
        edges = (ns - nf) + (a - lo) + (hi - z) + (n - s + f) * SUBS
        total = edges + nf + z - a + (s - f) * SUBS
        slot = t % SLOTS
        mbarrier.wait(q_free.index(slot), ((t // SLOTS) & 1) ^ 1)
        if BLOCKS:
            info.index(slot * 3).store(gl.full([1], f, gl.int32, ONE))
            info.index(slot * 3 + 1).store(gl.full([1], s, gl.int32, ONE))
            info.index(slot * 3 + 2).store(gl.full([1], n, gl.int32, ONE))
        mbarrier.arrive(told.index(slot), count=1)
        for half in gl.static_range(2):
            ready = q_ready.index(slot * 2 + half)
            mbarrier.expect(ready, q.block_type.nbytes)
            at = [b, h + (half * RH // R) * PH, first + (half * RH) % R, 0]
            _load(q, at, ready, qs.index(slot * 2 + half))
        for i in range(gl.maximum(total, 1)):
            start, listed = _tile(i, edges, f, s, ns, nf, lo, a, z, hi, here, block_k, SUBS, BN, WINDOWS, BLOCKS)
            stage = c % STAGES
            phase = ((c // STAGES) & 1) ^ 1
            mbarrier.wait(k_free.index(stage), phase)
            mbarrier.expect(k_ready.index(stage), k.block_type.nbytes)
            _load(k, [b, g, start, 0], k_ready.index(stage), ks.index(stage))
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_ready.index(stage), v.block_type.nbytes)
            _load(v, [b, g, start, 0], v_ready.index(stage), vs.index(stage))
            c += 1
        t += 1  # noqa: SIM113 (a kernel has no enumerate)


@gluon.jit
def _issue(HALF: gl.constexpr, c, queries, probs, acc, zero, ks, vs, bars, STAGES: gl.constexpr, BN: gl.constexpr,
           HD: gl.constexpr, HDV: gl.constexpr):
    """Starts the scores of tile c and the values of the tile before it, in this group's turn; waits for the scores."""
    told, q_ready, q_free, k_ready, v_ready, k_free, v_free, turns = bars
    stage = c % STAGES
    before = (c - 1) % STAGES
    mbarrier.wait(k_ready.index(stage), (c // STAGES) & 1)
    keys = ks.index(stage).reshape([BN, HD])
    mbarrier.wait(turns.index(HALF), (c & 1) ^ (1 - HALF))
    scores = warpgroup_mma(queries, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), ((c - 1) // STAGES) & 1)
    values = vs.index(before).reshape([BN, HDV])
    acc = warpgroup_mma(probs, values, acc, is_async=True)
    mbarrier.arrive(turns.index(1 - HALF), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    return scores, acc, before


@gluon.jit
def _consume(
    HALF: gl.constexpr, o, lse, qs, ks, vs, info, bars, lists, window, sizes, scale,
    BN: gl.constexpr, SUBS: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, R: gl.constexpr, P: gl.constexpr,
    PH: gl.constexpr, RH: gl.constexpr, TILES: gl.constexpr, HD: gl.constexpr, HDV: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOWS: gl.constexpr, BLOCKS: gl.constexpr, LSE: gl.constexpr,
):
    """Softmax attention of 64 rows over the tiles."""
    S: gl.constexpr = _products(BN)
    A: gl.constexpr = _products(HDV)
    PL: gl.constexpr = gl.DotOperandLayout(0, A, 2)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = ks.dtype
    told, q_ready, q_free, k_ready, v_ready, k_free, v_free, turns = bars
    index, count, sib, sih, siq, scb = lists
    sinks, recents = window
    programs, packs, rows, H, share, list_share, N, M, offset, lines, block_q, block_k = sizes
    row = gl.arange(0, 64, gl.SliceLayout(1, S))
    col = gl.arange(0, BN, gl.SliceLayout(0, S))
    place = row + HALF * 64
    zero = gl.zeros([64, BN], gl.float32, S)
    c = 0
    t = 0
    for pid in range(gl.program_id(0), programs, gl.num_programs(0)):
        b, g, h, line, tile = _where(pid, packs, rows, H, share, TILES, P)
        first = line * block_q + tile * R
        end = gl.minimum((line + 1) * block_q, N)
        mine = h // list_share
        here = index
        if BLOCKS:
            here = index + b.to(gl.int64) * sib + mine.to(gl.int64) * sih + line.to(gl.int64) * siq
        p_row = first + place % R
        p = p_row + offset
        slot = t % SLOTS
        turn = (t // SLOTS) & 1
        mbarrier.wait(told.index(slot), turn)
        low, high = _ends(first, (line + 1) * block_q, R, N, offset)
        sink, recent, ns, nf, lo, a, z, hi = 0, 0, 0, 0, 0, 0, 0, 0
        if WINDOWS:
            sink = gl.load(sinks + mine)
            recent = gl.load(recents + mine)
            ns, nf, lo, a, z, hi, band = _spans(low, high, M, sink, recent, BN, CAUSAL)
        n, s, f = 0, 0, 0
        if BLOCKS:
            f = gl.sum(info.index(slot * 3).load(ONE), 0)
            s = gl.sum(info.index(slot * 3 + 1).load(ONE), 0)
            n = gl.sum(info.index(slot * 3 + 2).load(ONE), 0)
        edges = (ns - nf) + (a - lo) + (hi - z) + (n - s + f) * SUBS
        total = edges + nf + z - a + (s - f) * SUBS
        held = gl.where(total > 0, M, 0)
        total = gl.maximum(total, 1)
        acc = gl.zeros([64, HDV], gl.float32, A)

        # the first tile is always masked: it is the edge where there is one, or nothing where the list is empty
        mbarrier.wait(q_ready.index(slot * 2 + HALF), turn)
        queries = qs.index(slot * 2 + HALF).reshape([64, HD])
        stage = c % STAGES
        mbarrier.wait(k_ready.index(stage), (c // STAGES) & 1)
        keys = ks.index(stage).reshape([BN, HD])
        mbarrier.wait(turns.index(HALF), (c & 1) ^ (1 - HALF))
        scores = warpgroup_mma(queries, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.arrive(turns.index(1 - HALF), count=1)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        start, listed = _tile(0, edges, f, s, ns, nf, lo, a, z, hi, here, block_k, SUBS, BN, WINDOWS, BLOCKS)
        seen = _seen(start + col, p, held, sink, recent, listed, CAUSAL, WINDOWS, BLOCKS)
        scores = gl.where(seen, scores * scale, float("-inf"))
        m = gl.max(scores, 1)
        level = gl.where(m == float("-inf"), 0.0, m)
        weights = gl.exp2(scores - level[:, None])
        l = gl.sum(weights, 1)
        probs = gl.convert_layout(weights.to(dtype), PL)
        c += 1

        for i in range(1, edges):
            scores, acc, before = _issue(HALF, c, queries, probs, acc, zero, ks, vs, bars, STAGES, BN, HD, HDV)
            start, listed = _tile(i, edges, f, s, ns, nf, lo, a, z, hi, here, block_k, SUBS, BN, WINDOWS, BLOCKS)
            seen = _seen(start + col, p, M, sink, recent, listed, CAUSAL, WINDOWS, BLOCKS)
            scores = gl.where(seen, scores * scale, float("-inf"))
            top = gl.maximum(m, gl.max(scores, 1))
            level = gl.where(top == float("-inf"), 0.0, top)
            weights = gl.exp2(scores - level[:, None])
            alpha = gl.exp2(m - level)
            m = top
            l = l * alpha + gl.sum(weights, 1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_free.index(before), count=1)
            probs = gl.convert_layout(weights.to(dtype), PL)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, A))[:, None]
            c += 1

        for _ in range(gl.maximum(edges, 1), total):
            scores, acc, before = _issue(HALF, c, queries, probs, acc, zero, ks, vs, bars, STAGES, BN, HD, HDV)
            top = gl.maximum(m, gl.max(scores, 1) * scale)
            weights = gl.exp2(scores * scale - top[:, None])
            alpha = gl.exp2(m - top)
            m = top
            l = l * alpha + gl.sum(weights, 1)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_free.index(before), count=1)
            probs = gl.convert_layout(weights.to(dtype), PL)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, A))[:, None]
            c += 1

        before = (c - 1) % STAGES
        mbarrier.wait(v_ready.index(before), ((c - 1) // STAGES) & 1)
        values = vs.index(before).reshape([BN, HDV])
        acc = warpgroup_mma(probs, values, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(before), count=1)
        divisor = gl.where(l > 0, l, 1.0)
        acc = acc / gl.convert_layout(divisor, gl.SliceLayout(1, A))[:, None]
        # the queries are read: their place takes the output
        out = qs.index(slot * 2 + HALF).reshape([64, HDV])
        out.store(acc.to(dtype))
        fence_async_shared()
        at = [b, h + (HALF * RH // R) * PH, first + (HALF * RH) % R, 0]
        _store(o, at, qs.index(slot * 2 + HALF))
        if LSE:
            logs = gl.where(l > 0, (m + gl.log2(divisor)) * 0.6931471805599453, float("-inf"))
            where = (b.to(gl.int64) * H + h + place // R) * N + p_row
            gl.store(lse + where, logs, mask=p_row < end)
        tma.store_wait(0)
        mbarrier.arrive(q_free.index(slot), count=1)
        t += 1  # noqa: SIM113 (a kernel has no enumerate)


@gluon.jit(do_not_specialize=[
    "sib", "sih", "siq", "scb", "programs", "H", "share", "list_share", "N", "M", "offset", "lines", "block_q",
    "block_k",
])
def _forward(
    q, k, v, o, lse, index, count, sinks, recents, sib, sih, siq, scb, programs, scale, H, share, list_share, N, M,
    offset, lines, block_q, block_k,
    HD: gl.constexpr, HDV: gl.constexpr, R: gl.constexpr, P: gl.constexpr, PH: gl.constexpr, RH: gl.constexpr,
    BN: gl.constexpr, TILES: gl.constexpr, SUBS: gl.constexpr, CAUSAL: gl.constexpr, WINDOWS: gl.constexpr,
    BLOCKS: gl.constexpr, LSE: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):
    packs = share // P
    rows = lines * TILES
    qs = gl.allocate_shared_memory(q.dtype, [2 * SLOTS, 1, PH, RH, HD], q.layout)
    ks = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BN, HD], k.layout)
    vs = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BN, HDV], v.layout)
    # what the copying group found out about a program's list
    info = gl.allocate_shared_memory(gl.int32, [3 * SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # the groups issue their matmuls in turns, so that one multiplies while the other exponentiates
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(q_ready.index(2 * i), count=1)
        mbarrier.init(q_ready.index(2 * i + 1), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    bars = (told, q_ready, q_free, k_ready, v_ready, k_free, v_free, turns)
    lists = (index, count, sib, sih, siq, scb)
    window = (sinks, recents)
    sizes = (programs, packs, rows, H, share, list_share, N, M, offset, lines, block_q, block_k)
    gl.warp_specialize([
        (_consume, (0, o, lse, qs, ks, vs, info, bars, lists, window, sizes, scale, BN, SUBS, STAGES, SLOTS, R, P, PH,
                    RH, TILES, HD, HDV, CAUSAL, WINDOWS, BLOCKS, LSE)),
        (_consume, (1, o, lse, qs, ks, vs, info, bars, lists, window, sizes, scale, BN, SUBS, STAGES, SLOTS, R, P, PH,
                    RH, TILES, HD, HDV, CAUSAL, WINDOWS, BLOCKS, LSE)),
        (_produce, (q, k, v, qs, ks, vs, info, bars, lists, window, sizes, BN, SUBS, STAGES, SLOTS, R, P, PH, RH, TILES,
                    CAUSAL, WINDOWS, BLOCKS)),
    ], [4, 4], [REGISTERS, 504 - 2 * REGISTERS])
