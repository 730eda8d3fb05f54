"""The Triton kernels of scan with a decay per key channel (gated linear attention): segments as in `triton_chunks`.

No single weight per pair holds the decays, so a pair of a chunk is summed channel by channel, q_i k_j exp(c_i - c_j)
with the running sums c [chunk, K] of log decays: chunks are short, and only what crosses them is a product of matrices.
All exponents are <= 0.

    o  = values(q, k, v) from S_0       dv = values(k, q, do) from dS_N, against time
    dq = keys(do, v, k) from S_0        dk = keys(v, do, q) from dS_N, against time

`values` sums the pair's channels and weighs values; `keys` weighs keys, channel by channel, with the pair's do·v.
Gated Linear Attention: Yang et al. 2024, arXiv 2312.06635, github.com/fla-org/flash-linear-attention.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.here import here
from saccade.kernels.scan.triton_chunks import Cut, block, precision

CHUNK = 16


@triton.jit
def _rows(at, step, valid, width, C: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """A tile [C, W] of rows; 0 beyond the valid rows and the width."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, W)[None, :]
    tile = tl.load(at + i * step + j, mask=(i < valid) & (j < width), other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def _sums(log, step, channel, valid, K, C: tl.constexpr, BK: tl.constexpr):
    """Running sums of a chunk's log decays and the last one, for exp2: [C, BK] and [BK]."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, BK)[None, :]
    g = tl.load(log + i * step + j * channel, mask=(i < valid) & (j < K), other=0.0).to(tl.float32)
    g *= 1.4426950408889634
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit(do_not_specialize=["N", "chunks", "segments"])
def _grow(
    k_ptr, v_ptr, log_ptr, out_ptr, total_ptr, N, chunks, segments, H, K, V,
    k_b, k_h, k_n, v_b, v_h, v_n, log_b, log_h, log_n, log_k,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment alone adds to the state: out [B,H,segments,K,V]; total [B,H,segments,K]: its log decays."""
    tiles_k = tl.cdiv(K, BK)
    tiles = tiles_k * tl.cdiv(V, BV)
    pid = tl.program_id(0)
    tile, rest = pid % tiles, pid // tiles
    at_k, at_v = (tile % tiles_k) * BK, (tile // tiles_k) * BV
    segment, bh = rest % segments, (rest // segments).to(tl.int64)
    begin = segment.to(tl.int64) * chunks * C
    count = tl.cdiv(tl.minimum(N - begin, chunks * C).to(tl.int32), C)
    k = k_ptr + bh // H * k_b + bh % H * k_h + at_k
    v = v_ptr + bh // H * v_b + bh % H * v_h + at_v
    log = log_ptr + bh // H * log_b + bh % H * log_h + at_k * log_k
    state = tl.zeros([BK, BV], tl.float32)
    total = tl.zeros([BK], tl.float32)
    for step in range(count):
        row = begin + ((count - 1 - step) if REVERSE else step) * C
        valid = tl.minimum(N - row, C).to(tl.int32)
        c, last = _sums(log + row * log_n, log_n, log_k, valid, K - at_k, C, BK)
        keys = _rows(k + row * k_n, k_n, valid, K - at_k, C, BK, WIDE)
        values = _rows(v + row * v_n, v_n, valid, V - at_v, C, BV, WIDE)
        keys = (keys * tl.exp2(c if REVERSE else last[None, :] - c)).to(values.dtype)
        state = tl.dot(tl.trans(keys), values, state * tl.exp2(last)[:, None], input_precision=PRECISION)
        total += last
    i = at_k + tl.arange(0, BK)
    j = at_v + tl.arange(0, BV)
    inside = (i < K)[:, None] & (j < V)[None, :]
    tl.store(out_ptr + (bh * segments + segment) * K * V + i[:, None] * V + j[None, :], state, mask=inside)
    if at_v == 0:
        tl.store(total_ptr + (bh * segments + segment) * K + i, total, mask=i < K)


@triton.jit(do_not_specialize=["segments"])
def _carry(grown_ptr, total_ptr, start_ptr, segments, K, V, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """In place: grown [B,H,segments,K*V] becomes the state that each segment starts from."""
    bh = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < K * V
    state = tl.load(start_ptr + bh * K * V + i, mask=inside, other=0.0)
    for step in range(segments):
        segment = bh * segments + ((segments - 1 - step) if REVERSE else step)
        grown = tl.load(grown_ptr + segment * K * V + i, mask=inside, other=0.0)
        tl.store(grown_ptr + segment * K * V + i, state, mask=inside)
        state = state * tl.exp2(tl.load(total_ptr + segment * K + i // V, mask=inside, other=0.0)) + grown


@triton.jit(do_not_specialize=["N", "chunks", "segments"])
def _values(
    q_ptr, k_ptr, v_ptr, log_ptr, state_ptr, o_ptr, end_ptr, N, chunks, segments, H, K, V,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, log_b, log_h, log_n, log_k,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A segment's outputs from the state before it: state [B,H,segments,K,V], o [B,H,N,V], end [B,H,K,V]."""
    tiles = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    at_v, rest = (pid % tiles) * BV, pid // tiles
    segment, bh = rest % segments, (rest // segments).to(tl.int64)
    begin = segment.to(tl.int64) * chunks * C
    count = tl.cdiv(tl.minimum(N - begin, chunks * C).to(tl.int32), C)
    q = q_ptr + bh // H * q_b + bh % H * q_h
    k = k_ptr + bh // H * k_b + bh % H * k_h
    v = v_ptr + bh // H * v_b + bh % H * v_h + at_v
    log = log_ptr + bh // H * log_b + bh % H * log_h
    r = tl.arange(0, C)
    i = tl.arange(0, BK)
    j = at_v + tl.arange(0, BV)
    inside = (i < K)[:, None] & (j < V)[None, :]
    where = i[:, None] * V + j[None, :]
    state = tl.load(state_ptr + (bh * segments + segment) * K * V + where, mask=inside, other=0.0)
    for step in range(count):
        row = begin + ((count - 1 - step) if REVERSE else step) * C
        valid = tl.minimum(N - row, C).to(tl.int32)
        c, last = _sums(log + row * log_n, log_n, log_k, valid, K, C, BK)
        queries = _rows(q + row * q_n, q_n, valid, K, C, BK, WIDE)
        keys = _rows(k + row * k_n, k_n, valid, K, C, BK, WIDE)
        values = _rows(v + row * v_n, v_n, valid, V - at_v, C, BV, WIDE)
        scores = tl.zeros([C, C], tl.float32)
        for other in tl.static_range(C):
            own = (r == other)[:, None]
            key = tl.sum(tl.where(own, keys.to(tl.float32), 0.0), 0)
            sums = tl.sum(tl.where(own, c, 0.0), 0)[None, :]
            # exponents of the pairs that are masked below would be positive
            decay = tl.exp2(tl.minimum(sums - c if REVERSE else c - sums, 0.0))
            score = tl.sum(queries.to(tl.float32) * key[None, :] * decay, 1)
            score = tl.where(r <= other if REVERSE else r >= other, score, 0.0)
            scores = tl.where((r == other)[None, :], score[:, None], scores)
        into = tl.exp2(last[None, :] - c if REVERSE else c)
        behind = tl.exp2(c if REVERSE else last[None, :] - c)
        out = tl.dot((queries * into).to(keys.dtype), state.to(keys.dtype), input_precision=PRECISION)
        out = tl.dot(scores.to(values.dtype), values, out, input_precision=PRECISION)
        at = o_ptr + (bh * N + row + r[:, None]) * V + j[None, :]
        tl.store(at, out.to(o_ptr.dtype.element_ty), mask=(r < valid)[:, None] & (j < V)[None, :])
        keys = (keys * behind).to(values.dtype)
        state = tl.dot(tl.trans(keys), values, state * tl.exp2(last)[:, None], input_precision=PRECISION)
    if segment == (0 if REVERSE else segments - 1):
        tl.store(end_ptr + bh * K * V + where, state, mask=inside)


@triton.jit(do_not_specialize=["N", "chunks", "segments"])
def _keys(
    q_ptr, k_ptr, v_ptr, log_ptr, state_ptr, o_ptr, N, chunks, segments, H, K, V,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, log_b, log_h, log_n, log_k,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries (of keys, against time): q, k [B,H,N,V], v, o [B,H,N,K], state [B,H,segments,K,V].

    A program has some of the K channels and all of V.
    """
    tiles = tl.cdiv(K, BK)
    pid = tl.program_id(0)
    at_k, rest = (pid % tiles) * BK, pid // tiles
    segment, bh = rest % segments, (rest // segments).to(tl.int64)
    begin = segment.to(tl.int64) * chunks * C
    count = tl.cdiv(tl.minimum(N - begin, chunks * C).to(tl.int32), C)
    q = q_ptr + bh // H * q_b + bh % H * q_h
    k = k_ptr + bh // H * k_b + bh % H * k_h
    v = v_ptr + bh // H * v_b + bh % H * v_h + at_k
    log = log_ptr + bh // H * log_b + bh % H * log_h + at_k * log_k
    r = tl.arange(0, C)
    i = at_k + tl.arange(0, BK)
    j = tl.arange(0, BV)
    inside = (j < V)[:, None] & (i < K)[None, :]
    # the state lies transposed here: [V, K]
    where = (bh * segments + segment) * K * V + i[None, :] * V + j[:, None]
    state = tl.load(state_ptr + where, mask=inside, other=0.0)
    for step in range(count):
        row = begin + ((count - 1 - step) if REVERSE else step) * C
        valid = tl.minimum(N - row, C).to(tl.int32)
        c, last = _sums(log + row * log_n, log_n, log_k, valid, K - at_k, C, BK)
        queries = _rows(q + row * q_n, q_n, valid, V, C, BV, WIDE)
        keys = _rows(k + row * k_n, k_n, valid, V, C, BV, WIDE)
        values = _rows(v + row * v_n, v_n, valid, K - at_k, C, BK, WIDE)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        into = tl.exp2(last[None, :] - c if REVERSE else c)
        behind = tl.exp2(c if REVERSE else last[None, :] - c)
        out = tl.dot(queries, state.to(queries.dtype), input_precision=PRECISION) * into
        for other in tl.static_range(C):
            own = (r == other)[:, None]
            value = tl.sum(tl.where(own, values.to(tl.float32), 0.0), 0)[None, :]
            sums = tl.sum(tl.where(own, c, 0.0), 0)[None, :]
            score = tl.sum(tl.where((r == other)[None, :], scores, 0.0), 1)
            score = tl.where(r <= other if REVERSE else r >= other, score, 0.0)
            # exponents of the pairs that are masked above would be positive
            out += score[:, None] * value * tl.exp2(tl.minimum(sums - c if REVERSE else c - sums, 0.0))
        at = o_ptr + (bh * N + row + r[:, None]) * K + i[None, :]
        tl.store(at, out.to(o_ptr.dtype.element_ty), mask=(r < valid)[:, None] & (i < K)[None, :])
        values = (values * behind).to(keys.dtype)
        state = tl.dot(tl.trans(keys), values, state * tl.exp2(last)[None, :], input_precision=PRECISION)


def cut(q: Tensor, v: Tensor) -> Cut:
    """As `triton_chunks.cut`, for short chunks."""
    B, H, N, _ = q.shape
    chunks = -(-N // CHUNK)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    wanted = max(1, min(-(-8 * processors // (B * H)), chunks // 32))
    each = -(-chunks // wanted)
    return Cut(CHUNK, each, -(-chunks // each))


@here
def states(k: Tensor, v: Tensor, log: Tensor, start: Tensor, by: Cut, reverse: bool = False) -> Tensor:
    """The state before each segment (behind it, against time): [B,H,segments,K,V]; log [B,H,N,K], start [B,H,K,V]."""
    B, H, N, K = k.shape
    V = v.shape[3]
    if by.segments == 1:
        return start[:, :, None]
    out = torch.empty(B, H, by.segments, K, V, dtype=torch.float32, device=k.device)
    total = torch.empty(B, H, by.segments, K, dtype=torch.float32, device=k.device)
    wide, digits = precision(k)
    BK, BV = (min(64, block(n)) for n in (K, V))
    _grow[(triton.cdiv(K, BK) * triton.cdiv(V, BV) * by.segments * B * H,)](
        k, v, log, out, total, N, by.chunks, by.segments, H, K, V,
        *k.stride()[:3], *v.stride()[:3], *log.stride(),
        C=by.chunk, BK=BK, BV=BV, REVERSE=reverse, WIDE=wide, PRECISION=digits, num_warps=4, num_stages=2,
    )  # fmt: skip
    _carry[(triton.cdiv(K * V, 1024), B * H)](
        out, total, start, by.segments, K, V, BLOCK=1024, REVERSE=reverse, num_warps=4
    )
    return out


@here
def values(
    q: Tensor, k: Tensor, v: Tensor, log: Tensor, before: Tensor, by: Cut, end: Tensor, reverse: bool = False
) -> Tensor:
    """Outputs [B,H,N,V] (gradients of values, against time); `end` [B,H,K,V] is filled."""
    B, H, N, K = q.shape
    V = v.shape[3]
    o = torch.empty(B, H, N, V, dtype=v.dtype, device=v.device)
    wide, digits = precision(q)
    BV = min(64, block(V))
    _values[(triton.cdiv(V, BV) * by.segments * B * H,)](
        q, k, v, log, before, o, end, N, by.chunks, by.segments, H, K, V,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *log.stride(),
        C=by.chunk, BK=block(K), BV=BV, REVERSE=reverse, WIDE=wide, PRECISION=digits, num_warps=4, num_stages=2,
    )  # fmt: skip
    return o


@here
def keys(
    q: Tensor, k: Tensor, v: Tensor, log: Tensor, before: Tensor, by: Cut, dtype: torch.dtype, reverse: bool = False
) -> Tensor:
    """Gradients of queries (of keys, against time) [B,H,N,K]: q, k [B,H,N,V], v [B,H,N,K]."""
    B, H, N, V = q.shape
    K = v.shape[3]
    o = torch.empty(B, H, N, K, dtype=dtype, device=v.device)
    wide, digits = precision(q)
    BK = min(64, block(K))
    _keys[(triton.cdiv(K, BK) * by.segments * B * H,)](
        q, k, v, log, before, o, N, by.chunks, by.segments, H, K, V,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *log.stride(),
        C=by.chunk, BK=BK, BV=block(V), REVERSE=reverse, WIDE=wide, PRECISION=digits, num_warps=4, num_stages=2,
    )  # fmt: skip
    return o
