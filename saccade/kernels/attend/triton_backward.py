"""The gradient of attend over blocks and windows, any mixture of them per head.

The softmax is computed again from the saved log-sum-exp, as in FlashAttention-2 (arXiv 2307.08691, official repository
github.com/Dao-AILab/flash-attention). One kernel goes by query blocks over their lists and gives dq; one goes by key
blocks over the transposed lists and gives dk and dv, all query heads of a key head in one program. The first keys,
which every row may read, are split among programs and added up afterwards. Sums have a fixed order, nothing is added
atomically: two runs agree bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.core.call import Call
from saccade.core.pattern import Blocks, Full, Pattern, PerHead, Union, Window
from saccade.kernels.attend.lower import Lowered
from saccade.kernels.attend.triton_readers import Readers, readers
from saccade.kernels.here import here
from saccade.kernels.merge import Out

LOG2E = math.log2(math.e)
WIDEST = 256  # of a head
LONGEST = 128  # of a tile, in rows
HOT = 2  # tiles of the first keys that are split among programs
STRETCH = 4096  # of rows, for one program of such a tile
SPREAD = 1024  # such programs at most; a batch that has more heads fills the machine without them


def refuses_gradients(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None) -> str | None:
    """Why these kernels cannot give the gradients of a call, in words; None where they can."""
    parts = [pattern]
    while parts:
        part = parts.pop()
        if isinstance(part, Union):
            parts += part.parts
        elif isinstance(part, PerHead):
            parts += [p for _, p in part.parts]
        elif not isinstance(part, Full | Window | Blocks):
            return f"gradients through {type(part).__name__} have no kernel (Full, Window and Blocks have)"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"gradients need float32, float16 or bfloat16, got {q.dtype}"
    step = 16 // q.element_size()
    for width in (q.shape[3], v.shape[3]):
        if width > WIDEST or width % step:
            return f"gradients need head widths that are multiples of {step} up to {WIDEST}, got {width}"
    return None


def attend_with_gradients(q: Tensor, k: Tensor, v: Tensor, lowered: Lowered, call: Call, bias: Tensor | None) -> Out:
    """As `triton_prefill.launch`, and the gradients of q, k, v and bias through o and lse.

    Args:
        lowered: the pattern as lists and windows per head, without tokens.
        bias: what is added to the logits of a key, [1|B, 1|G|H, M], or None.

    Shapes:
        q [B,H,N,D], k [B,G,M,D], v [B,G,M,Dv] -> Out(o [B,H,N,Dv], lse [B,H,N])
    """
    return Out(*_Attend.apply(q, k, v, bias, lowered, call))  # type: ignore[no-untyped-call]


class _Attend(torch.autograd.Function):
    """The forward kernel, and what its backward needs: q, k, v, o and the log-sum-exp; no scores are kept."""

    @staticmethod
    def forward(ctx, q, k, v, bias, lowered, call):  # type: ignore[no-untyped-def]
        from saccade.kernels.attend.triton_prefill import launch

        out = launch(q, k, v, lowered, call, bias, lse=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, bias, out.o, out.lse)
        ctx.lowered, ctx.call = lowered, call
        return out.o, out.lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):  # type: ignore[no-untyped-def]
        q, k, v, bias, o, lse = ctx.saved_tensors
        dbias = bias is not None and ctx.needs_input_grad[3]
        return *gradients(q, k, v, o, lse, do, dlse, ctx.lowered, ctx.call, bias, dbias), None, None


class Tile(NamedTuple):
    """Rows and columns of scores in a tile, and how a kernel is launched."""

    rows: int
    columns: int
    warps: int
    stages: int


def tiles(width: int, size: int) -> tuple[Tile, Tile]:
    """The tiles of the two kernels, by query and by key block, for a padded head width and bytes per number."""
    if size == 4:
        return (Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)) if width <= 64 else (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))
    if width <= 64:
        return Tile(128, 64, 4, 2), Tile(128, 64, 4, 2)
    if width <= 128:
        return Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)
    return Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)


@here
def gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor | None,
    dlse: Tensor | None,
    lowered: Lowered,
    call: Call,
    bias: Tensor | None = None,
    want_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and, if wanted, dbias, from the gradients do [B,H,N,Dv] and dlse [B,H,N] of the two results."""
    B, H, G, N, M = call.shape
    D, Dv, size, device = q.shape[3], v.shape[3], q.element_size(), q.device
    DP, DVP = (max(16, triton.next_power_of_2(width)) for width in (D, Dv))
    by_q, by_k = tiles(max(DP, DVP), size)
    index, listed = lowered.index, lowered.index is not None
    block_q, block_k = (lowered.block_q, lowered.block_k) if listed else (by_q.rows, by_k.columns)
    by_q = by_q._replace(rows=_cut(by_q.rows, block_q), columns=_cut(by_q.columns, block_k))
    by_k = by_k._replace(rows=_cut(by_k.rows, block_q), columns=_cut(by_k.columns, block_k))
    nq, nk, K = -(-N // block_q), -(-M // block_k), 0 if index is None else index.shape[3]

    do = torch.zeros_like(o) if do is None else do
    q, k, v, o, do = (_aligned(t) for t in (q, k, v, o, do))
    # what both kernels need of a row: its log-sum-exp in base 2 (+inf: nothing was seen), and what its dp are less;
    # for whole tiles and one more, so that nobody has to ask where the rows end
    padded = (-(-nq * block_q // LONGEST) + 1) * LONGEST
    row_lse, row_delta = (torch.empty((B, H, padded), dtype=torch.float32, device=device) for _ in range(2))
    _rows[(padded // 64, B * H)](
        *(_tiled(o, 64, DVP), _tiled(do, 64, DVP), lse.contiguous(), lse if dlse is None else dlse.contiguous()),
        *(row_lse, row_delta, N, H, padded),
        DLSE=dlse is not None,
        ROWS=64,
        DV=DVP,
        num_warps=4,
    )
    placed = not call.contiguous
    whole = not placed and block_k % by_q.columns == 0
    none = row_lse  # stands where a pointer is not read
    lists = readers(lowered, N, M, call.causal, whole) if listed else Readers(none, none, none, none)
    order, split, rows, runs = lists
    sink, recent = lowered.sink, lowered.recent
    q_pos, q_pos_b = none, 0
    k_pos, k_pos_b, k_pos_g = none, 0, 0
    if call.q_pos is not None and call.k_pos is not None:
        q_pos, k_pos = call.q_pos.to(device, torch.int32).contiguous(), call.k_pos.to(device, torch.int32).contiguous()
        q_pos_b = N if q_pos.shape[0] > 1 else 0
        k_pos_b, k_pos_g = k_pos.shape[1] * M if k_pos.shape[0] > 1 else 0, M if k_pos.shape[1] > 1 else 0
    weight, dweight = none, none
    if bias is not None:
        share = H // bias.shape[1] if bias.shape[1] in {1, H} else H // G
        weight = bias.detach().float().repeat_interleave(share, dim=1).expand(B, H, M).contiguous()
    if want_bias:
        dweight = torch.empty((B, H, M), dtype=torch.float32, device=device)

    dq = torch.empty((B, H, N, D), dtype=q.dtype, device=device)
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=device) for t in (k, v))
    scale = call.softmax_scale(D)
    batches = 1 if index is None else index.shape[0]
    sizes = (N, M, padded, H, lowered.lists, nq, nk, K, block_q, block_k, batches, q_pos_b, k_pos_b, k_pos_g)
    kinds: dict[str, Any] = dict(
        SHARE=H // G,
        D=DP,
        DV=DVP,
        LISTS=listed,
        WINDOWS=lowered.windows,
        CAUSAL=call.causal,
        PLACED=placed,
        BIAS=bias is not None,
        PRECISION="ieee" if size == 4 else "tf32",
    )
    _by_query[(nq * -(-block_q // by_q.rows), B * H)](
        *(_tiled(t, n, w) for t, n, w in ((q, by_q.rows, DP), (do, by_q.rows, DVP))),
        *(_tiled(t, n, w) for t, n, w in ((k, by_q.columns, DP), (v, by_q.columns, DVP))),
        *(row_lse, row_delta, dq, order, split, sink, recent, weight, q_pos, k_pos, scale * LOG2E, scale, D, *sizes),
        **kinds,
        ROWS=by_q.rows,
        COLUMNS=by_q.columns,
        num_warps=by_q.warps,
        num_stages=by_q.stages,
    )
    # the first tiles of keys, which sinks make every row read, are spread over many programs
    count = nk * -(-block_k // by_k.columns)
    chunks = 1 if want_bias else max(1, min(-(-N // STRETCH), SPREAD // (HOT * B * H)))
    hot = min(HOT, count) if H // G * chunks > 1 and HOT * B * H <= SPREAD else 0
    parts = hot * chunks * B * H
    part_k, part_v = (torch.empty((parts, by_k.columns, w), dtype=torch.float32, device=device) for w in (DP, DVP))
    _by_key[(parts + (count - hot) * B * G,)](
        *(_tiled(t, n, w) for t, n, w in ((q, by_k.rows, DP), (do, by_k.rows, DVP))),
        *(_tiled(t, n, w) for t, n, w in ((k, by_k.columns, DP), (v, by_k.columns, DVP))),
        *(row_lse, row_delta, dk, dv, dweight, part_k, part_v, hot, chunks, max(count, hot + 1)),
        *(rows, runs, sink, recent, weight, q_pos, k_pos, scale * LOG2E, scale, D, Dv, B, *sizes),
        **kinds,
        DBIAS=want_bias,
        EVEN=block_q % by_k.rows == 0,
        ROWS=by_k.rows,
        COLUMNS=by_k.columns,
        num_warps=by_k.warps,
        num_stages=by_k.stages,
    )
    if hot:
        _together[(hot, B * G, by_k.columns // 8)](
            *(part_k, part_v, dk, dv, D, Dv, chunks, M, B, H, block_k),
            SHARE=H // G,
            D=DP,
            DV=DVP,
            COLUMNS=by_k.columns,
            STEP=8,
            num_warps=4,
        )
    dbias = None
    if bias is not None and want_bias:
        dbias = dweight.view(B, bias.shape[1], -1, M).sum(2)
        dbias = (dbias.sum(0, keepdim=True) if bias.shape[0] == 1 else dbias).to(bias.dtype)
    return dq, dk, dv, dbias


def _cut(most: int, block: int) -> int:
    """How long a tile is along a block: such that tiles fill the block, if that leaves them 16 long."""
    even = block & -block
    return min(most, even if even >= 16 else max(16, triton.next_power_of_2(block)))


def _aligned(t: Tensor) -> Tensor:
    """The tensor if the hardware can copy tiles of it as it lies, else a copy."""
    step = 16 // t.element_size()
    rows = [s for s, n in zip(t.stride()[:3], t.shape[:3], strict=True) if n > 1]
    fine = t.stride(3) == 1 and all(s % step == 0 and s > 0 for s in rows) and t.data_ptr() % 16 == 0
    return t if fine else t.clone(memory_format=torch.contiguous_format)


def _tiled(t: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles of [rows, width] of one head; what lies outside reads as 0. An axis of one may have any stride."""
    strides = [s if n > 1 else t.shape[3] for s, n in zip(t.stride()[:3], t.shape[:3], strict=True)]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, rows, width])


@triton.jit(do_not_specialize=["N", "H", "padded"])
def _rows(o, do, lse, dlse, row_lse, row_delta, N, H, padded, DLSE: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr):
    """delta = sum(o * do) - dlse, and the log-sum-exp in base 2; both such that a row without keys gives nothing."""
    tile, head = tl.program_id(0), tl.program_id(1)
    one = o.load([head // H, head % H, tile * ROWS, 0]).reshape(ROWS, DV).to(tl.float32)
    two = do.load([head // H, head % H, tile * ROWS, 0]).reshape(ROWS, DV).to(tl.float32)
    row = tile * ROWS + tl.arange(0, ROWS)
    at = head.to(tl.int64) * N + row
    delta = tl.sum(one * two, 1)
    if DLSE:
        delta -= tl.load(dlse + at, mask=row < N, other=0.0)
    total = tl.load(lse + at, mask=row < N, other=float("-inf"))
    empty = total == float("-inf")
    at = head.to(tl.int64) * padded + row
    tl.store(row_lse + at, tl.where(empty, float("inf"), total * 1.4426950408889634))
    tl.store(row_delta + at, tl.where(empty, 0.0, delta))


@triton.jit
def _seen(p, j, slot, end, listed, sink, recent, CAUSAL: tl.constexpr, PLACED: tl.constexpr):
    """Which pairs of a tile count. A pair in the window counts in the window's tiles, and so never in those of a list.

    p, j: positions of rows and columns; slot < end: the column belongs to this block.
    """
    near = (j < sink) | (tl.abs(p - j) < recent)
    seen = (slot < end) & (near != listed)
    if CAUSAL:
        seen = seen & (j <= p)
    if PLACED:
        seen = seen & (j >= 0) & (p >= 0)
    return seen


PLACES = ("q_pos_b", "k_pos_b", "k_pos_g")


@triton.jit
def _span(low, high, inner, outer, SIZE: tl.constexpr):
    """Tiles that cover [low, high): first and last; and first and last of those within [inner, outer)."""
    first, last = low // SIZE, tl.cdiv(high, SIZE)
    last = tl.maximum(last, first)
    first_whole = tl.minimum(tl.maximum(tl.cdiv(inner, SIZE), first), last)
    last_whole = tl.maximum(tl.minimum(outer // SIZE, last), first_whole)
    return first, last, first_whole, last_whole


@triton.jit(do_not_specialize=["N", "M", "padded", "H", "L", "nq", "nk", "K", "block_q", "block_k", "batches", *PLACES])
def _by_query(
    q,
    do,
    k,
    v,
    row_lse,
    row_delta,
    dq,
    order,
    split,
    sinks,
    recents,
    bias,
    q_pos,
    k_pos,
    scale2,
    scale,
    width,
    N,
    M,
    padded,
    H,
    L,
    nq,
    nk,
    K,
    block_q,
    block_k,
    batches,
    q_pos_b,
    k_pos_b,
    k_pos_g,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    LISTS: tl.constexpr,
    WINDOWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PLACED: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dq of one tile of rows: first the tiles that need no mask, then the others."""
    tile = tl.program_id(0)
    if CAUSAL:
        # late rows see most: they go first
        tile = tl.num_programs(0) - 1 - tile
    head = tl.program_id(1)
    b, h = head // H, head % H
    g = h // SHARE
    per_block = tl.cdiv(block_q, ROWS)
    qb = tile // per_block
    begin = qb * block_q + tile % per_block * ROWS
    row = begin + tl.arange(0, ROWS)
    real = row < tl.minimum(N, (qb + 1) * block_q)
    at = head.to(tl.int64) * padded + row
    lse, delta = tl.load(row_lse + at), tl.load(row_delta + at)
    tile_q = q.load([b, h, begin, 0]).reshape(ROWS, D)
    tile_do = do.load([b, h, begin, 0]).reshape(ROWS, DV)
    p = row + M - N
    if PLACED:
        p = tl.load(q_pos + b * q_pos_b + row, mask=real, other=-1)
    bias += head.to(tl.int64) * M
    k_pos += b * k_pos_b + g * k_pos_g

    mine = h // (H // L)
    sink, recent, far = 0, 0, 0
    n0, n1, f0, f1 = 0, 0, 0, 0
    if WINDOWS:
        sink, recent = tl.load(sinks + mine), tl.load(recents + mine)
        if PLACED:
            n1 = tl.where((sink > 0) | (recent > 0), tl.cdiv(M, COLUMNS), 0)
            f0, f1 = n1, n1
        else:
            first = begin + M - N
            last = tl.minimum(first + ROWS, M) - 1
            reach = tl.minimum(recent, N + M)
            ahead = tl.minimum(reach, 1) if CAUSAL else reach
            low, inner = tl.maximum(first - reach + 1, 0), tl.maximum(last - reach + 1, 0)
            high, outer = tl.minimum(last + ahead, M), tl.minimum(first + ahead, M)
            low, high = tl.where(recent > 0, tl.minimum(low, M), M + COLUMNS), tl.where(recent > 0, high, 0)
            n0, n1, f0, f1 = _span(low, high, inner, outer, COLUMNS)
            # tiles of the sink that lie before those
            far = tl.minimum(tl.cdiv(tl.minimum(sink, last + 1 if CAUSAL else M), COLUMNS), n0)

    whole, masked = 0, 0
    parts = tl.cdiv(block_k, COLUMNS)
    if LISTS:
        line = (tl.where(batches > 1, b * L, 0) + mine) * nq + qb
        whole = tl.load(split + 2 * line) * parts
        masked = tl.load(split + 2 * line + 1) * parts
        order += line.to(tl.int64) * K
        if CAUSAL and not PLACED:
            # tiles at the end of the last block that lie in the future of all rows
            edge = tl.load(order + K - masked // parts, mask=masked > 0, other=0) * block_k
            ahead = tl.maximum(begin + M - N + ROWS - 1 - edge, 0) // COLUMNS + 1
            masked -= tl.where(masked > 0, tl.maximum(parts - ahead, 0), 0)

    total = tl.zeros([ROWS, D], dtype=tl.float32)
    for t in tl.range(0, whole + f1 - f0):
        start = (f0 + t - whole) * COLUMNS
        if LISTS:
            block = tl.load(order + t // parts, mask=t < whole, other=0)
            start = tl.where(t < whole, block * block_k + t % parts * COLUMNS, start)
        tile_k = k.load([b, g, start, 0]).reshape(COLUMNS, D)
        tile_v = v.load([b, g, start, 0]).reshape(COLUMNS, DV)
        s = tl.dot(tile_q, tile_k.T, input_precision=PRECISION) * scale2
        if BIAS:
            s += tl.load(bias + start + tl.arange(0, COLUMNS))[None, :] * 1.4426950408889634
        w = tl.exp2(s - lse[:, None])
        dp = tl.dot(tile_do, tile_v.T, input_precision=PRECISION)
        ds = (w * (dp - delta[:, None])).to(tile_k.dtype)
        total = tl.dot(ds, tile_k, total, input_precision=PRECISION)

    for t in tl.range(0, masked + far + (f0 - n0) + (n1 - f1)):
        u = t - masked
        start = tl.where(u < far, u, tl.where(u < far + f0 - n0, n0 + u - far, f1 + u - far - (f0 - n0))) * COLUMNS
        end = M
        listed = False
        if LISTS:
            listed = t < masked
            block = tl.load(order + K - 1 - t // parts, mask=listed, other=0)
            start = tl.where(listed, block * block_k + t % parts * COLUMNS, start)
            end = tl.where(listed, tl.minimum((block + 1) * block_k, M), M)
        tile_k = k.load([b, g, start, 0]).reshape(COLUMNS, D)
        tile_v = v.load([b, g, start, 0]).reshape(COLUMNS, DV)
        s = tl.dot(tile_q, tile_k.T, input_precision=PRECISION) * scale2
        slot = start + tl.arange(0, COLUMNS)
        j = slot
        if PLACED:
            j = tl.load(k_pos + slot, mask=slot < M, other=-1)
        if BIAS:
            s += tl.load(bias + slot, mask=slot < M, other=0.0)[None, :] * 1.4426950408889634
        seen = _seen(p[:, None], j[None, :], slot[None, :], end, listed, sink, recent, CAUSAL, PLACED)
        w = tl.exp2(tl.where(seen, s - lse[:, None], float("-inf")))
        dp = tl.dot(tile_do, tile_v.T, input_precision=PRECISION)
        ds = (w * (dp - delta[:, None])).to(tile_k.dtype)
        total = tl.dot(ds, tile_k, total, input_precision=PRECISION)

    column = tl.arange(0, D)
    out = dq + (head.to(tl.int64) * N + row)[:, None] * width + column[None, :]
    tl.store(out, (total * scale).to(dq.dtype.element_ty), mask=real[:, None] & (column < width)[None, :])


@triton.jit(
    do_not_specialize=[
        "width",
        "width_v",
        "N",
        "M",
        "padded",
        "H",
        "L",
        "nq",
        "nk",
        "K",
        "block_q",
        "block_k",
        "batches",
        *PLACES,
    ]
)
def _by_key(
    q,
    do,
    k,
    v,
    row_lse,
    row_delta,
    dk,
    dv,
    dbias,
    part_k,
    part_v,
    hot,
    chunks,
    tiles,
    rows,
    runs,
    sinks,
    recents,
    bias,
    q_pos,
    k_pos,
    scale2,
    scale,
    width,
    width_v,
    B,
    N,
    M,
    padded,
    H,
    L,
    nq,
    nk,
    K,
    block_q,
    block_k,
    batches,
    q_pos_b,
    k_pos_b,
    k_pos_g,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    LISTS: tl.constexpr,
    WINDOWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PLACED: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    DBIAS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dk and dv of one tile of columns: the query heads of its key head one after the other, scores transposed.

    Of the first tiles, which all rows may read, a program does one head and one chunk of the rows: sums to be added up.
    """
    G = H // SHARE
    program = tl.program_id(0)
    # those come first, as they may be the longest; after them one key head after the other, its tiles side by side
    split = program < hot * chunks * B * H
    rest = tl.where(split, 0, program - hot * chunks * B * H)
    tile = tl.where(split, program // (chunks * B * H), hot + rest % (tiles - hot))
    chunk, among = tl.where(split, program % chunks, 0), tl.where(split, chunks, 1)
    first = tl.where(split, program // chunks % (B * H), rest // (tiles - hot) * SHARE)
    heads = tl.where(split, 1, SHARE)
    b, g = first // H, first % H // SHARE
    per_block = tl.cdiv(block_k, COLUMNS)
    kb = tile // per_block
    begin = kb * block_k + tile % per_block * COLUMNS
    slot = begin + tl.arange(0, COLUMNS)
    end = tl.minimum(M, (kb + 1) * block_k)
    tile_k = k.load([b, g, begin, 0]).reshape(COLUMNS, D)
    tile_v = v.load([b, g, begin, 0]).reshape(COLUMNS, DV)
    j = slot
    if PLACED:
        j = tl.load(k_pos + b * k_pos_b + g * k_pos_g + slot, mask=slot < end, other=-1)
    stop = tl.minimum(begin + COLUMNS, end) - 1
    parts, offset = tl.cdiv(block_q, ROWS), M - N

    total_k = tl.zeros([COLUMNS, D], dtype=tl.float32)
    total_v = tl.zeros([COLUMNS, DV], dtype=tl.float32)
    for r in range(heads):
        h = (first + r) % H
        at_head = (first + r).to(tl.int64)
        lses, deltas = row_lse + at_head * padded, row_delta + at_head * padded
        total_b = tl.zeros([COLUMNS], dtype=tl.float32)
        weight = total_b
        if BIAS:
            weight = tl.load(bias + at_head * M + slot, mask=slot < M, other=0.0) * 1.4426950408889634

        # rows that look at this tile through the head's window
        mine = h // (H // L)
        sink, recent = 0, 0
        n0, n1, f0, f1 = 0, 0, 0, 0
        if WINDOWS:
            sink, recent = tl.load(sinks + mine), tl.load(recents + mine)
            if PLACED:
                n1 = tl.where((sink > 0) | (recent > 0), tl.cdiv(N, ROWS), 0)
                f0, f1 = n1, n1
            else:
                reach = tl.minimum(recent, N + M)
                back = 0 if CAUSAL else reach - 1
                low, inner = tl.maximum(begin - offset - back, 0), tl.maximum(stop - offset - back, 0)
                high, outer = tl.minimum(stop + reach - offset, N), begin + reach - offset
                high = tl.where(recent > 0, high, 0)
                if not CAUSAL:
                    low, inner = tl.where(begin < sink, 0, low), tl.where(stop < sink, 0, inner)
                high, outer = tl.where(begin < sink, N, high), tl.where(stop < sink, N, outer)
                # the last tile may stick out: rows that are not there weigh nothing
                outer = tl.where(outer >= N, tl.cdiv(N, ROWS) * ROWS, outer)
                n0, n1, f0, f1 = _span(low, high, inner, outer, ROWS)

        whole, masked, skip = 0, 0, 0
        list_whole, list_masked = rows, rows
        if LISTS:
            run = runs + ((tl.where(batches > 1, b * L, 0) + mine).to(tl.int64) * nk + kb) * 3
            one, two = tl.load(run + 1), tl.load(run + 2)
            list_whole = rows + tl.load(run)
            list_masked = list_whole + one
            whole, masked = one * parts, two * parts
            if CAUSAL and not PLACED:
                # tiles at the start of the first block that lie in the past of all keys
                edge = tl.load(list_masked, mask=two > 0, other=0) * block_q
                skip = tl.minimum(tl.maximum(begin - offset - edge, 0) // ROWS, tl.minimum(parts, masked))

        many = whole + f1 - f0
        for t in tl.range(many * chunk // among, many * (chunk + 1) // among):
            start = (f0 + t - whole) * ROWS
            if LISTS:
                block = tl.load(list_whole + t // parts, mask=t < whole, other=0)
                start = tl.where(t < whole, block * block_q + t % parts * ROWS, start)
            row = start + tl.arange(0, ROWS)
            lse, delta = tl.load(lses + row), tl.load(deltas + row)
            if LISTS and not EVEN:
                lse = tl.where((row < (block + 1) * block_q) | (t >= whole), lse, float("inf"))
            tile_q = q.load([b, h, start, 0]).reshape(ROWS, D)
            tile_do = do.load([b, h, start, 0]).reshape(ROWS, DV)
            s = tl.dot(tile_k, tile_q.T, input_precision=PRECISION) * scale2
            if BIAS:
                s += weight[:, None]
            w = tl.exp2(s - lse[None, :])
            total_v = tl.dot(w.to(tile_do.dtype), tile_do, total_v, input_precision=PRECISION)
            # delta enters as the accumulator: that needs fewest registers
            less = tl.broadcast_to(-delta[None, :], (COLUMNS, ROWS))
            ds = w * tl.dot(tile_v, tile_do.T, less, input_precision=PRECISION)
            total_k = tl.dot(ds.to(tile_q.dtype), tile_q, total_k, input_precision=PRECISION)
            if DBIAS:
                total_b += tl.sum(ds, 1)

        many = masked + (f0 - n0) + (n1 - f1) - skip
        for t in tl.range(skip + many * chunk // among, skip + many * (chunk + 1) // among):
            u = t - masked
            start = tl.where(u < f0 - n0, n0 + u, f1 + u - (f0 - n0)) * ROWS
            listed = False
            if LISTS:
                listed = t < masked
                block = tl.load(list_masked + t // parts, mask=listed, other=0)
                start = tl.where(listed, block * block_q + t % parts * ROWS, start)
            row = start + tl.arange(0, ROWS)
            lse, delta = tl.load(lses + row), tl.load(deltas + row)
            if LISTS and not EVEN:
                lse = tl.where((row < (block + 1) * block_q) | (t >= masked), lse, float("inf"))
            tile_q = q.load([b, h, start, 0]).reshape(ROWS, D)
            tile_do = do.load([b, h, start, 0]).reshape(ROWS, DV)
            s = tl.dot(tile_k, tile_q.T, input_precision=PRECISION) * scale2
            if BIAS:
                s += weight[:, None]
            p = row + M - N
            if PLACED:
                p = tl.load(q_pos + b * q_pos_b + row, mask=row < N, other=-1)
            seen = _seen(p[None, :], j[:, None], slot[:, None], end, listed, sink, recent, CAUSAL, PLACED)
            w = tl.exp2(tl.where(seen, s - lse[None, :], float("-inf")))
            total_v = tl.dot(w.to(tile_do.dtype), tile_do, total_v, input_precision=PRECISION)
            # delta enters as the accumulator: that needs fewest registers
            less = tl.broadcast_to(-delta[None, :], (COLUMNS, ROWS))
            ds = w * tl.dot(tile_v, tile_do.T, less, input_precision=PRECISION)
            total_k = tl.dot(ds.to(tile_q.dtype), tile_q, total_k, input_precision=PRECISION)
            if DBIAS:
                total_b += tl.sum(ds, 1)

        if DBIAS:
            tl.store(dbias + at_head * M + slot, total_b, mask=slot < end)

    column, column_v = tl.arange(0, D)[None, :], tl.arange(0, DV)[None, :]
    total_k *= scale
    if split:
        line = program.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
        tl.store(part_k + line * D + column, total_k)
        tl.store(part_v + line * DV + column_v, total_v)
    else:
        real = (slot < end)[:, None]
        at = ((b * G + g).to(tl.int64) * M + slot)[:, None]
        tl.store(dk + at * width + column, total_k.to(dk.dtype.element_ty), mask=real & (column < width))
        tl.store(dv + at * width_v + column_v, total_v.to(dv.dtype.element_ty), mask=real & (column_v < width_v))


@triton.jit(do_not_specialize=["chunks", "M", "B", "H", "block_k"])
def _together(
    part_k,
    part_v,
    dk,
    dv,
    width,
    width_v,
    chunks,
    M,
    B,
    H,
    block_k,
    SHARE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Add up what the programs of a split tile found, always in the same order."""
    tile, pair, step = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    per_block = tl.cdiv(block_k, COLUMNS)
    inside = step * STEP + tl.arange(0, STEP)
    kb = tile // per_block
    slot = kb * block_k + tile % per_block * COLUMNS + inside
    column, column_v = tl.arange(0, D)[None, :], tl.arange(0, DV)[None, :]
    total_k, total_v = tl.zeros([STEP, D], dtype=tl.float32), tl.zeros([STEP, DV], dtype=tl.float32)
    begin = (tile * B * H + pair * SHARE) * chunks
    for part in range(SHARE * chunks):
        line = (begin + part).to(tl.int64) * COLUMNS + inside[:, None]
        total_k += tl.load(part_k + line * D + column)
        total_v += tl.load(part_v + line * DV + column_v)
    real = (slot < tl.minimum(M, (kb + 1) * block_k))[:, None]
    at = (pair.to(tl.int64) * M + slot)[:, None]
    tl.store(dk + at * width + column, total_k.to(dk.dtype.element_ty), mask=real & (column < width))
    tl.store(dv + at * width_v + column_v, total_v.to(dv.dtype.element_ty), mask=real & (column_v < width_v))
