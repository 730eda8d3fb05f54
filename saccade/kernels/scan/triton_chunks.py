"""The Triton kernels of scan with one decay per head or per token: three launches, forwards or backwards in time.

The sequence is cut into segments of many chunks. (1) `_grow`: what each segment alone adds to the state, all segments
at once. (2) `_carry`: the state before each segment, a short loop over segments. (3) `_answer`: each segment from its
state on, chunk by chunk, all segments at once. q is read once, k and v twice, o is written once; the states of segments
are few. With enough heads there is one segment, and only (3) runs.

The gradients are scans too. With S the state and R its gradient, in time's own direction and against it:

    o  = scan(q, k, v) from S_0          dq = scan(do, v, k) from S_0 transposed
    dv = reversed scan(k, q, do) from dS_N, dk = reversed scan(v, do, q) from dS_N transposed

A chunk with running sums c of log decays: a pair weighs exp(c_later - c_earlier); what comes in from before weighs
exp(c_i), what goes out behind exp(c_last - c_i); against time these two change places. All exponents are <= 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.here import here

LOG2E = 1.4426950408889634  # the kernels' exponents are of 2


class Cut(NamedTuple):
    """How a sequence is cut: tokens in a chunk, chunks in a segment, number of segments."""

    chunk: int
    chunks: int
    segments: int


@triton.jit
def _load(at, stride, valid, width, C: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr):
    """A tile [C, W] of rows; 0 beyond the valid rows and the width."""
    i = tl.arange(0, C)
    j = tl.arange(0, W)
    where = at + i[:, None] * stride + j[None, :]
    if EXACT and EVEN:
        return tl.load(where)
    if EVEN:
        return tl.load(where, mask=(i < valid)[:, None], other=0.0)
    return tl.load(where, mask=(i < valid)[:, None] & (j < width)[None, :], other=0.0)


@triton.jit(do_not_specialize=["N"])
def _add_up(log_ptr, out_ptr, N, H, log_b, log_h, log_n, C: tl.constexpr, R: tl.constexpr):
    """Running sums of log decays within each chunk: out [B,H,N]."""
    bh = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * R * C + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    g = tl.load(log_ptr + bh // H * log_b + bh % H * log_h + row * log_n, mask=row < N, other=0.0)
    tl.store(out_ptr + bh * N + row, tl.cumsum(g, 1), mask=row < N)


@triton.jit
def _sums(log, stride, valid, HEAD: tl.constexpr, C: tl.constexpr):
    """A chunk's running sums of log decays and the last of them; rows that are not there add nothing."""
    i = tl.arange(0, C)
    if HEAD:
        g = tl.load(log)
        return g * tl.minimum(i + 1, valid), g * valid
    last = tl.load(log + (valid - 1) * stride)
    return tl.where(i < valid, tl.load(log + i * stride, mask=i < valid, other=0.0), last), last


@triton.jit
def _grown(
    state, k, v, log, k_step, v_step, log_step, valid, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EVEN_K: tl.constexpr, EVEN_V: tl.constexpr,
    HEAD: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state [BK, BV] behind a chunk."""
    c, last = _sums(log, log_step, valid, HEAD, C)
    weight = tl.exp2(c) if REVERSE else tl.exp2(last - c)
    keys = _load(k, k_step, valid, K, C, BK, EVEN_K, EXACT)
    values = _load(v, v_step, valid, V, C, BV, EVEN_V, EXACT)
    if WIDE:
        keys = keys.to(tl.float32)
    values = (values * weight[:, None]).to(keys.dtype)
    return tl.dot(tl.trans(keys), values, state * tl.exp2(last), input_precision=PRECISION), last


@triton.jit(do_not_specialize=["N", "chunks", "segments"])
def _grow(
    k_ptr, v_ptr, log_ptr, out_ptr, total_ptr, N, chunks, segments, H, K, V,
    k_b, k_h, k_n, v_b, v_h, v_n, log_b, log_h, log_n,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EVEN_K: tl.constexpr, EVEN_V: tl.constexpr,
    HEAD: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment alone adds to the state: out [B,H,segments,K,V]; total [B,H,segments] = sum of its log decays.

    The last segment (the first, against time) adds to no other: it is left out.
    """
    tiles_k = tl.cdiv(K, BK)
    tiles = tiles_k * tl.cdiv(V, BV)
    pid = tl.program_id(0)
    tile, rest = pid % tiles, pid // tiles
    at_k, at_v = (tile % tiles_k) * BK, (tile // tiles_k) * BV
    segment, bh = rest % (segments - 1), (rest // (segments - 1)).to(tl.int64)
    if REVERSE:
        segment += 1
    b, h = bh // H, bh % H
    begin = segment.to(tl.int64) * chunks * C
    rows = tl.minimum(N - begin, chunks * C).to(tl.int32)
    count = tl.cdiv(rows, C)
    k = k_ptr + b * k_b + h * k_h + at_k
    v = v_ptr + b * v_b + h * v_h + at_v
    log = log_ptr + b * log_b + h * log_h
    state = tl.zeros([BK, BV], tl.float32)
    total = 0.0
    for step in range(count):
        row = begin + ((count - 1 - step) if REVERSE else step) * C
        valid = C if EXACT else tl.minimum(N - row, C).to(tl.int32)
        state, last = _grown(
            state, k + row * k_n, v + row * v_n, log + row * log_n, k_n, v_n, log_n, valid, K - at_k, V - at_v,
            C, BK, BV, EVEN_K, EVEN_V, HEAD, REVERSE, EXACT, WIDE, PRECISION,
        )  # fmt: skip
        total += last
    i = at_k + tl.arange(0, BK)[:, None]
    j = at_v + tl.arange(0, BV)[None, :]
    out = out_ptr + (bh * segments + segment) * K * V
    tl.store(out + i * V + j, state, mask=(i < K) & (j < V))
    if tile == 0:
        tl.store(total_ptr + bh * segments + segment, total)


@triton.jit(do_not_specialize=["segments"])
def _carry(grown_ptr, total_ptr, start_ptr, segments, size, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """In place: grown [B,H,segments,K*V] becomes the state that each segment starts from."""
    bh = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = bh * segments + (segments - 1 if REVERSE else 0)
    sign = -1 if REVERSE else 1
    grown, total = grown_ptr + first * size + i, total_ptr + first
    state = tl.load(start_ptr + bh * size + i, mask=i < size, other=0.0)
    # one segment ahead: the next load is under way while this one is stored
    more = tl.load(grown, mask=i < size, other=0.0)
    for step in range(segments - 1):
        ahead = tl.load(grown + sign * size, mask=(i < size) & (i * 0 + step < segments - 2), other=0.0)
        tl.store(grown, state, mask=i < size)
        state = state * tl.exp2(tl.load(total)) + more
        more = ahead
        grown += sign * size
        total += sign
    tl.store(grown, state, mask=i < size)


@triton.jit
def _answered(
    state, q, k, v, log, o, x, r, kept, whole, q_step, k_step, v_step, log_step, o_step, x_step, r_half, valid, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EVEN_K: tl.constexpr, EVEN_V: tl.constexpr,
    HEAD: tl.constexpr, REVERSE: tl.constexpr, PRODUCT: tl.constexpr, EXACT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a chunk's outputs and return the state [BK, BV] behind it."""
    i = tl.arange(0, C)
    c, last = _sums(log, log_step, valid, HEAD, C)
    queries = _load(q, q_step, valid, K, C, BK, EVEN_K, EXACT)
    keys = _load(k, k_step, valid, K, C, BK, EVEN_K, EXACT)
    values = _load(v, v_step, valid, V, C, BV, EVEN_V, EXACT)
    if WIDE:
        queries, keys, values = queries.to(tl.float32), keys.to(tl.float32), values.to(tl.float32)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    # the future is masked before exp2: its exponents are positive and would overflow
    if REVERSE:
        pair = tl.where(i[:, None] <= i[None, :], c[None, :] - c[:, None], float("-inf"))
        into, behind = tl.exp2(last - c), tl.exp2(c)
    else:
        pair = tl.where(i[:, None] >= i[None, :], c[:, None] - c[None, :], float("-inf"))
        into, behind = tl.exp2(c), tl.exp2(last - c)
    scores *= tl.exp2(pair)
    out = tl.dot(queries, state.to(queries.dtype), input_precision=PRECISION) * into[:, None]
    if PRODUCT:
        other = _load(x, x_step, valid, V, C, BV, EVEN_V, EXACT).to(tl.float32)
        before = tl.sum(other * out, 1)
        at = kept + tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]
        if REVERSE:
            # the state before the chunk times the gradient of that behind it: what crosses all of the chunk
            tl.store(whole, tl.sum(tl.sum(tl.load(at).to(tl.float32) * state, 1), 0) * tl.exp2(last))
        else:
            tl.store(at, state.to(kept.dtype.element_ty))
        # a token's pair with itself crosses nothing: it would cancel in the end, but for its rounding
        own = tl.sum(tl.where(i[:, None] == i[None, :], scores, 0.0), 1)
        scores = tl.where(i[:, None] == i[None, :], 0.0, scores)
    out = tl.dot(scores.to(values.dtype), values, out, input_precision=PRECISION)
    if PRODUCT:
        tl.store(r + i, before, mask=i < valid)
        tl.store(r + r_half + i, tl.sum(other * out, 1) - before, mask=i < valid)
        out += own[:, None] * values.to(tl.float32)
    j = tl.arange(0, BV)
    keep = (i < valid)[:, None] & (j < V)[None, :]
    tl.store(o + i[:, None] * o_step + j[None, :], out.to(o.dtype.element_ty), mask=keep)
    values = (values * behind[:, None]).to(keys.dtype)
    return tl.dot(tl.trans(keys), values, state * tl.exp2(last), input_precision=PRECISION)


@triton.jit(do_not_specialize=["N", "chunks", "segments"])
def _answer(
    q_ptr, k_ptr, v_ptr, log_ptr, state_ptr, o_ptr, end_ptr, x_ptr, r_ptr, kept_ptr, whole_ptr,
    N, chunks, segments, H, K, V, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, log_b, log_h, log_n,
    o_b, o_h, o_n, x_b, x_h, x_n, s_k, s_v, r_t, r_half,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, EVEN_K: tl.constexpr, EVEN_V: tl.constexpr,
    HEAD: tl.constexpr, REVERSE: tl.constexpr, PRODUCT: tl.constexpr, END: tl.constexpr,
    EXACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A segment's outputs from the state before it: state [B,H,segments,K,V], o [B,H,N,V], end [B,H,K,V].

    PRODUCT: r [tiles,2,B,H,N] = sums over the tile's columns of x times what the output holds from before the
    chunk, and from the chunk's other tokens. The states before all chunks are kept [B,H,all chunks,tiles,BK,BV];
    against time, their products with the states behind are whole [tiles,B,H,all chunks].
    """
    tiles = tl.cdiv(V, BV)
    pid = tl.program_id(0)
    # tiles of one segment run side by side: they read the same q and k
    tile, rest = pid % tiles, pid // tiles
    at_v = tile * BV
    segment, bh = rest % segments, (rest // segments).to(tl.int64)
    b, h = bh // H, bh % H
    begin = segment.to(tl.int64) * chunks * C
    rows = tl.minimum(N - begin, chunks * C).to(tl.int32)
    count = tl.cdiv(rows, C)
    q = q_ptr + b * q_b + h * q_h
    k = k_ptr + b * k_b + h * k_h
    v = v_ptr + b * v_b + h * v_h + at_v
    o = o_ptr + b * o_b + h * o_h + at_v
    x = x_ptr + b * x_b + h * x_h + at_v
    r = r_ptr + tile.to(tl.int64) * r_t + bh * N
    first = bh * tl.cdiv(N, C)
    whole = whole_ptr + tile * tl.cdiv(N, C) * (r_half // N)
    log = log_ptr + b * log_b + h * log_h
    i = tl.arange(0, BK)[:, None]
    j = at_v + tl.arange(0, BV)[None, :]
    inside = (i < K) & (j < V)
    state = tl.load(state_ptr + (bh * segments + segment) * K * V + i * s_k + j * s_v, mask=inside, other=0.0)
    for step in range(count):
        row = begin + ((count - 1 - step) if REVERSE else step) * C
        valid = C if EXACT else tl.minimum(N - row, C).to(tl.int32)
        state = _answered(
            state, q + row * q_n, k + row * k_n, v + row * v_n, log + row * log_n, o + row * o_n, x + row * x_n,
            r + row, kept_ptr + ((first + row // C) * tiles + tile) * BK * BV, whole + first + row // C,
            q_n, k_n, v_n, log_n, o_n, x_n, r_half, valid, K, V - at_v,
            C, BK, BV, EVEN_K, EVEN_V, HEAD, REVERSE, PRODUCT, EXACT, WIDE, PRECISION,
        )  # fmt: skip
    if END and segment == (0 if REVERSE else segments - 1):
        tl.store(end_ptr + bh * K * V + i * V + j, state, mask=inside)


def cut(q: Tensor, v: Tensor) -> Cut:
    """Segments enough to fill the device, and each long enough that its state costs little beside its tokens."""
    B, H, N, _ = q.shape
    chunk = 64
    chunks = -(-N // chunk)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    wanted = max(1, min(-(-16 * processors // (B * H)), chunks // 16))
    each = -(-chunks // wanted)
    return Cut(chunk, each, -(-chunks // each))


class Tile(NamedTuple):
    """Key columns and value columns of the state that a program holds, its warps, and its loads in flight."""

    keys: int
    values: int
    warps: int
    stages: int


def grow_tile(k: Tensor, v: Tensor) -> Tile:
    """For `_grow`: both axes may be cut. Measured on an H200."""
    narrow = k.dtype == torch.bfloat16
    K, V = (min(128 if narrow else 64, block(t.shape[3])) for t in (k, v))
    return Tile(K, V, 4, 3 if narrow else 2)


def answer_tile(q: Tensor, v: Tensor, products: bool = False) -> Tile:
    """For `_answer`, which needs all of the keys' columns. Measured on an H200; more in flight is slower.

    bfloat16 always has loads in flight: without, a tile of 32 columns and 4 warps left its memory (Triton 3.6).
    """
    K, V = block(q.shape[3]), block(v.shape[3])
    if q.dtype != torch.bfloat16:
        return Tile(K, 32 if K > 128 else 64, 4, 1)
    # a warp group has too few registers for the state and what the products take
    return Tile(K, min(64, V), 8 if K > 128 or products else 4, 2)


@here
def states(k: Tensor, v: Tensor, log: Tensor, start: Tensor, by: Cut, reverse: bool = False) -> Tensor:
    """The state before each segment (behind it, against time): [B,H,segments,K,V] float32.

    k [B,H,N,K], v [B,H,N,V], log [B,H,N] or one number per head as strides of 0, start [B,H,K,V].
    """
    B, H, N, K = k.shape
    V = v.shape[3]
    if by.segments == 1:
        return start[:, :, None]
    out = torch.empty(B, H, by.segments, K, V, dtype=torch.float32, device=k.device)
    total = torch.empty(B, H, by.segments, dtype=torch.float32, device=k.device)
    wide, digits = precision(k)
    BK, BV, warps, stages = grow_tile(k, v)
    grid = (triton.cdiv(K, BK) * triton.cdiv(V, BV) * (by.segments - 1) * B * H,)
    _grow[grid](
        k, v, log, out, total, N, by.chunks, by.segments, H, K, V,
        *k.stride()[:3], *v.stride()[:3], *log.stride(),
        C=by.chunk, BK=BK, BV=BV, EVEN_K=K % BK == 0, EVEN_V=V % BV == 0, HEAD=_constant(log), REVERSE=reverse,
        EXACT=_exact(k, by), WIDE=wide, PRECISION=digits,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _carry[(triton.cdiv(K * V, 1024), B * H)](
        out, total, start, by.segments, K * V, BLOCK=1024, REVERSE=reverse, num_warps=4
    )
    return out


class Answer(NamedTuple):
    """Outputs [B,H,N,V], and where asked for: products [2,B,H,N], kept states, their products [B,H,chunks]."""

    o: Tensor
    products: Tensor
    kept: Tensor
    whole: Tensor


@here
def outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log: Tensor,
    before: Tensor,
    by: Cut,
    *,
    reverse: bool = False,
    end: Tensor | None = None,
    times: Tensor | None = None,
    kept: Tensor | None = None,
) -> Answer:
    """Outputs in v's dtype from the states before the segments; `end` [B,H,K,V] is filled.

    `times` [B,H,N,V]: also its products, summed over V, with what the outputs hold from before (behind) the token's
    chunk and from the chunk's other tokens. Forwards the state before each chunk is kept; against time the kept
    ones of the same widths are needed. `before` [B,H,segments,K,V] may be a transposed view.
    """
    B, H, N, K = q.shape
    V = v.shape[3]
    o = torch.empty(B, H, N, V, dtype=v.dtype, device=v.device)
    wide, digits = precision(q)
    BK, BV, warps, stages = answer_tile(q, v, times is not None)
    tiles, chunks = triton.cdiv(V, BV), triton.cdiv(N, by.chunk)
    x, r, whole = o, o, o
    if times is not None:
        x = times
        r = torch.empty(tiles, 2, B, H, N, dtype=torch.float32, device=v.device)
        whole = torch.empty(tiles, B, H, chunks, dtype=torch.float32, device=v.device)
        if kept is None:
            dtype = torch.float32 if wide else v.dtype
            kept = torch.empty(B, H, chunks, tiles, BK, BV, dtype=dtype, device=v.device)
    kept = o if kept is None else kept
    _answer[(tiles * by.segments * B * H,)](
        q, k, v, log, before, o, o if end is None else end, x, r, kept, whole, N, by.chunks, by.segments, H, K, V,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *log.stride(), *o.stride()[:3], *x.stride()[:3],
        *before.stride()[3:], 2 * B * H * N, B * H * N,
        C=by.chunk, BK=BK, BV=BV, EVEN_K=K == BK, EVEN_V=V % BV == 0, HEAD=_constant(log), REVERSE=reverse,
        PRODUCT=times is not None, END=end is not None, EXACT=_exact(k, by), WIDE=wide, PRECISION=digits,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return Answer(o, r.sum(0) if times is not None else r, kept, whole.sum(0) if times is not None else whole)


@here
def add_up(decay: Tensor, shape: tuple[int, ...], by: Cut) -> Tensor:
    """Log decays [1|B,1|H,1|N,1] as the kernels take them, [B,H,N]: one number for all tokens, or sums by chunk."""
    log = decay[..., 0].float() * LOG2E
    if decay.shape[2] == 1:
        return log.expand(shape)
    b, h, N = log.shape
    sums = torch.empty(b, h, N, dtype=torch.float32, device=log.device)
    rows = max(1, 1024 // by.chunk)
    _add_up[(triton.cdiv(N, rows * by.chunk), b * h)](log, sums, N, h, *log.stride(), C=by.chunk, R=rows, num_warps=4)
    return sums.expand(shape)


def _exact(k: Tensor, by: Cut) -> bool:
    """Are all chunks whole, so that loads need no masks? Only where that was measured to pay."""
    return k.dtype == torch.bfloat16 and k.shape[2] % by.chunk == 0


def _constant(log: Tensor) -> bool:
    """Is it one number per head? Of a single token, the number is the sum."""
    return log.stride(2) == 0


def block(width: int) -> int:
    """The power of two that holds a width, at least what a matrix product takes."""
    return max(16, triton.next_power_of_2(width))


def precision(t: Tensor) -> tuple[bool, str]:
    """Widen in the kernel? and how float32 is multiplied. The sums of float16 would not fit into float16."""
    return t.dtype == torch.float16, "tf32" if t.dtype == torch.bfloat16 else "tf32x3"
