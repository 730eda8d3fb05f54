"""One to sixteen queries against a long store, on a GPU: the keys are split over the chip, the parts are merged.

`_decode` reads one part of one unit's keys (decode_units.py says what that is), `_merge` adds the parts of each query
row. The split over keys is Flash-Decoding's (Dao et al. 2023, github.com/Dao-AILab/flash-attention).

Nothing here waits for the GPU, so calls can be captured in a CUDA graph. As with any Triton kernel, make one call with
the same shapes before the capture: it compiles, and copies the table of a mixture to the device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Pattern
from saccade.kernels.attend.decode_units import EVERYTHING, LISTS, Form, Launch, Tile, cut, form_of, power, processors
from saccade.kernels.attend.decode_units import refuses as refuses_pattern
from saccade.kernels.attend.tile import training
from saccade.kernels.here import here
from saccade.kernels.merge import Out

WIDTH = 256  # widest head
USUAL = Tile(64, 64, 4, 2, 4)  # a step for one query and heads of 128
FEW = 16  # steps of a multiprocessor, up to which there are few
SERVED = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _add(
    q, k, v, k_scale, v_scale, slots, there, seen, bias, m, total, acc, scale, step_k, step_v,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BIAS: tl.constexpr,
    K_INT: tl.constexpr, V_INT: tl.constexpr,
):  # fmt: skip
    """Some keys more: slots [T] of which `there` are to be loaded and `seen` [R,T] count for a row."""
    d, dv, at = tl.arange(0, BD), tl.arange(0, BDV), slots.to(tl.int64)[:, None]
    loaded = there[:, None] if D == BD else there[:, None] & (d < D)[None]
    keys = tl.load(k + at * step_k + d[None], mask=loaded, other=0.0)
    scores = tl.dot(q, tl.trans(keys.to(q.dtype)), input_precision="tf32x3") * scale
    if K_INT:
        scores *= tl.load(k_scale + slots, mask=there, other=0.0)[None]
    if BIAS:
        scores += tl.load(bias[:, None] + slots[None], mask=seen, other=0.0).to(tl.float32) * 1.4426950408889634
    scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(m, tl.max(scores, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights, fade = tl.exp2(scores - safe[:, None]), tl.exp2(m - safe)
    loaded = there[:, None] if DV == BDV else there[:, None] & (dv < DV)[None]
    values = tl.load(v + at * step_v + dv[None], mask=loaded, other=0.0).to(q.dtype)
    total = total * fade + tl.sum(weights, 1)
    if V_INT:
        weights *= tl.load(v_scale + slots, mask=there, other=0.0)[None]
    acc = tl.dot(weights.to(q.dtype), values, acc * fade[:, None], input_precision="tf32x3")
    return top, total, acc


@triton.jit
def _positions(k_pos, slots, there, POS: tl.constexpr, AT: tl.constexpr):
    """Positions of slots, -1 for what is not there."""
    if POS:
        return tl.load(k_pos + slots, mask=there, other=-1).to(tl.int32)
    if AT:
        # a group without positions has a null pointer: slot = position
        given = k_pos.to(tl.int64) != 0
        told = tl.load(k_pos + slots, mask=there & (slots < tl.where(given, 2147483647, 0)), other=-1)
        return tl.where(given, told, slots)
    return slots


@triton.jit
def _inside(k_pos, q_pos, sink, recent):
    """Is a key in a row's window? [R,T]"""
    return (k_pos[None] < sink[:, None]) | (tl.abs(q_pos[:, None] - k_pos[None]) < recent[:, None])


@triton.jit(do_not_specialize=["N", "M", "splits", "count0", "count1", "count2"])
def _decode(
    q, k, v, k_scale, v_scale, o, sums, bias, q_pos, k_pos, sinks, recents, lengths, lists, work, units,
    scale, sink, recent, N, M, splits, count0, count1, count2, H, G,
    step_q, step_k, step_v, step_scale, step_bias, step_pos,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, BIAS: tl.constexpr, POS: tl.constexpr, FILLED: tl.constexpr, AT: tl.constexpr,
    K_INT: tl.constexpr, V_INT: tl.constexpr, TABLE: tl.constexpr,
    PARTIAL: tl.constexpr, LSE: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One part of one unit's keys.

    Args:
        lists: (index, batched, heads, lines, heads per row of the index, queries per line) for each list.
        work, units: with TABLE, unit and split of each program, and each unit's line (see `decode_units.Table`).
        lengths: with AT (keys given by address), slots held per [B,G], and behind them tokens seen per row [B].
        HEADS, QUERIES: without TABLE, query heads and queries (0: all) of a unit.
        BLOCK: slots of a block in each list.
        WINDOW, FULL: is there a window, and has it no end.
        FILLED: slots are positions, and those behind the newest query's hold nothing yet.
        K_INT, V_INT: keys, values are integers, to be multiplied by a scale for each slot.
        EARLY: this was launched before the kernel before it was done, and so may the next be.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    b, r, d = tl.program_id(1).to(tl.int64), tl.arange(0, R), tl.arange(0, BD)
    P: tl.constexpr = len(BLOCK)
    if TABLE:
        unit, split = tl.load(work + 2 * tl.program_id(0)), tl.load(work + 2 * tl.program_id(0) + 1)
        line = units + unit * (3 + P + R)
        g, splits, query = tl.load(line), tl.load(line + 1), tl.load(line + 2)
        ids = tl.load(line + 3 + P + r)
        real = ids >= 0
        ids = tl.maximum(ids, 0)
        head, n = ids // N, ids % N
        first_head = 0
    else:
        unit, split = tl.program_id(0) // splits, tl.program_id(0) % splits
        line = units
        queries = N if QUERIES == 0 else QUERIES
        chunks = (HEADS * queries + R - 1) // R
        row = unit % chunks * R + r
        query = unit // chunks % (N // queries) * queries
        first_head = unit // chunks // (N // queries) * HEADS
        g = first_head // (H // G)
        real = row < HEADS * queries
        head, n = first_head + tl.minimum(row // queries, HEADS - 1), query + row % queries
    if AT:
        M = tl.load(lengths + b * G + g)
        at = b * G + g
        k_base = tl.multiple_of(tl.load(k + at).to(tl.pointer_type(q.dtype.element_ty)), 16)
        v_base = tl.multiple_of(tl.load(v + at).to(tl.pointer_type(q.dtype.element_ty)), 16)
        pos_base = tl.load(k_pos + at).to(tl.pointer_type(tl.int32))
        pos = tl.where(real, tl.load(lengths + tl.num_programs(1) * G + b) - N + n, -1)
        scan = pos_base.to(tl.int64) != 0
    else:
        k_base, v_base = k + b * step_k[0] + g.to(tl.int64) * step_k[1], v + b * step_v[0] + g.to(tl.int64) * step_v[1]
        k_scale += b * step_scale[0] + g * step_scale[1]
        v_scale += b * step_scale[2] + g * step_scale[3]
        pos_base, scan = k_pos, POS
        if POS:
            pos_base += b * step_pos[1] + g * step_pos[2]
            pos = tl.load(q_pos + b * step_pos[0] + n, mask=real, other=-1).to(tl.int32)
        elif FILLED:
            pos = tl.load(q_pos + b * step_pos[0] + n, mask=real, other=-1).to(tl.int32)
            M = tl.minimum(M, tl.max(pos, 0) + 1)
        else:
            pos = tl.where(real, M - N + n, -1)
    bias_row = bias
    if BIAS:
        bias_row = bias + b * step_bias[0] + (head // step_bias[2]).to(tl.int64) * step_bias[1]
    q_at = q + b * step_q[0] + head.to(tl.int64)[:, None] * step_q[1] + n[:, None] * step_q[2] + d[None]
    rows = tl.load(q_at, mask=real[:, None] & (d < D)[None], other=0.0)
    m, total = tl.full((R,), float("-inf"), tl.float32), tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, BDV), tl.float32)

    # the window's keys: `far` first slots, then all from `near` on; where slots are not positions all slots
    far, near, length = 0, 0, 0
    sink_of, recent_of = tl.zeros((R,), tl.int32) + sink, tl.zeros((R,), tl.int32) + recent
    if FULL:
        length = M
    elif WINDOW:
        if TABLE:
            sink_of = tl.load(sinks + head, mask=real, other=0)
            recent_of = tl.load(recents + head, mask=real, other=0)
        oldest = tl.min(tl.where(real, pos, 1073741824), 0)
        far = tl.where(scan, 0, tl.minimum(tl.max(sink_of, 0), M))
        near = tl.where(scan, 0, tl.minimum(tl.maximum(oldest - tl.max(recent_of, 0) + 1, far), M))
        length = far + M - near
    tiles = (length + T - 1) // T
    for p in tl.static_range(P):
        count = count0 if p == 0 else (count1 if p == 1 else count2)
        here = 1 if not TABLE else (tl.load(line + 3 + p) >= 0).to(tl.int32)
        tiles += here * ((count * BLOCK[p] + T - 1) // T)
    share = (tiles + splits - 1) // splits
    begin = split * share
    end = begin + share

    base = 0
    if WINDOW:
        base = (length + T - 1) // T
        for t in tl.range(begin, tl.minimum(end, base), num_stages=STAGES):
            i = t * T + tl.arange(0, T)
            slots, there = tl.where(i < far, i, i - far + near), i < length
            p_key = _positions(pos_base, slots, there, POS, AT)
            there = there & (p_key >= 0)
            seen = there[None] & (pos >= 0)[:, None]
            if CAUSAL:
                seen = seen & (p_key[None] <= pos[:, None])
            if not FULL:
                seen = seen & _inside(p_key, pos, sink_of, recent_of)
            m, total, acc = _add(
                rows, k_base, v_base, k_scale, v_scale, slots, there, seen, bias_row, m, total, acc, scale,
                step_k[2], step_v[2], D, DV, BD, BDV, BIAS, K_INT, V_INT,
            )  # fmt: skip
    for p in tl.static_range(P):
        count = count0 if p == 0 else (count1 if p == 1 else count2)
        index, batched, heads, lines, share_of, height = lists[p]
        if TABLE:
            which = tl.load(line + 3 + p)
            size = tl.where(which >= 0, count, 0)
        else:
            which, size = first_head // share_of, count
        own = index + ((b * batched * heads + which) * lines + query // height) * count
        many = (size * BLOCK[p] + T - 1) // T
        for t in tl.range(tl.maximum(begin - base, 0), tl.minimum(end - base, many), num_stages=STAGES):
            i = t * T + tl.arange(0, T)
            if BLOCK[p] % T == 0:
                found = tl.load(own + t * T // BLOCK[p])
                slots = found * BLOCK[p] + t * T % BLOCK[p] + tl.arange(0, T)
            else:
                found = tl.load(own + i // BLOCK[p], mask=i < size * BLOCK[p], other=-1)
                slots = found * BLOCK[p] + i % BLOCK[p]
            # an empty entry, -1, gives slots below 0
            slots = slots.to(tl.int32)
            there = (slots >= 0) & (slots < M)
            p_key = _positions(pos_base, slots, there, POS, AT)
            there = there & (p_key >= 0)
            seen = there[None] & (pos >= 0)[:, None]
            if CAUSAL:
                seen = seen & (p_key[None] <= pos[:, None])
            if WINDOW:
                # a pair counts once
                seen = seen & (_inside(p_key, pos, sink_of, recent_of) == 0)
            m, total, acc = _add(
                rows, k_base, v_base, k_scale, v_scale, slots, there, seen, bias_row, m, total, acc, scale,
                step_k[2], step_v[2], D, DV, BD, BDV, BIAS, K_INT, V_INT,
            )  # fmt: skip
        base += many

    dv = tl.arange(0, BDV)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    lse = tl.where(total == 0, float("-inf"), m + tl.log2(tl.where(total == 0, 1.0, total)))
    at = (b * H + head) * N + n
    if PARTIAL:
        at = (b * tl.num_programs(0) + tl.program_id(0)) * R + r
    tl.store(o + at[:, None] * DV + dv[None], acc.to(o.dtype.element_ty), mask=real[:, None] & (dv < DV)[None])
    if PARTIAL:
        sums = o + tl.num_programs(1).to(tl.int64) * tl.num_programs(0) * R * DV
        tl.store(sums + at, lse, mask=real)
    elif LSE:
        tl.store(sums + at, lse * 0.6931471805599453, mask=real)


@triton.jit(do_not_specialize=["N", "splits", "programs"])
def _merge(
    parts, o, sums, places, N, splits, programs, H,
    DV: tl.constexpr, BDV: tl.constexpr, R: tl.constexpr, S: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    TABLE: tl.constexpr, LSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One query row: what its unit's programs found, weighed by exp(lse)."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if TABLE:
        first, splits, r = tl.load(places + 3 * row), tl.load(places + 3 * row + 1), tl.load(places + 3 * row + 2)
    else:
        queries = N if QUERIES == 0 else QUERIES
        head, n = row // N, row % N
        inner = head % HEADS * queries + n % queries
        unit = (head // HEADS * (N // queries) + n // queries) * ((HEADS * queries + R - 1) // R) + inner // R
        first, r = unit * splits, inner % R
    s, dv = tl.arange(0, S), tl.program_id(2) * BDV + tl.arange(0, BDV)
    at = (b * programs + first + s) * R + r
    lse = tl.load(
        parts + tl.num_programs(1).to(tl.int64) * programs * R * DV + at, mask=s < splits, other=float("-inf")
    )
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    wanted = (s < splits)[:, None] & (dv < DV)[None]
    found = tl.load(parts + at[:, None] * DV + dv[None], mask=wanted, other=0.0)
    acc = tl.sum(found * weights[:, None], 0) / tl.where(total == 0, 1.0, total)
    out = b * H * N + row
    tl.store(o + out * DV + dv, acc.to(o.dtype.element_ty), mask=dv < DV)
    if LSE:
        lse = tl.where(total == 0, float("-inf"), top + tl.log2(tl.where(total == 0, 1.0, total)))
        tl.store(sums + out, lse * 0.6931471805599453, mask=tl.program_id(2) == 0)


class Given(NamedTuple):
    """Keys and positions as the kernel takes them: tensors with strides, or (`by_address`) tables of addresses."""

    k: Tensor
    v: Tensor
    q_pos: Tensor
    k_pos: Tensor
    lengths: Tensor
    k_step: tuple[int, ...]
    v_step: tuple[int, ...]
    pos_step: tuple[int, ...]
    M: int
    holes: bool = False
    by_address: bool = False
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    filled: bool = False


def refuses(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None) -> str | None:
    """Why this kernel does not serve the call; None where it does."""
    if q.dtype not in SERVED:
        return f"decoding in {q.dtype}; the kernel knows float32, bfloat16 and float16"
    if training(q, k, v, bias):
        return f"gradients of {q.shape[2]} queries with a past; decoding has no backward pass"
    width = max(k.shape[3], v.shape[3])
    if width > WIDTH:
        return f"heads of width {width}; the decode kernel goes up to {WIDTH}"
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return "tensors whose channels do not lie side by side; make them contiguous"
    return refuses_pattern(pattern, call)


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None, lse: bool) -> Out:
    """As `saccade.kernels.attend.attend`."""
    form = form_of(pattern, call)
    tile = tile_for(q, v.shape[3], call.shape.H // call.shape.G * call.shape.N)
    launch = cut(form, call, q.device, _for_few_blocks(tile, form, call, q.device))
    return run(launch, q, given_by(q, k, v, call), bias, call, v.shape[3], lse)


def given_by(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Given:
    """Keys of one tensor, with the call's positions; q stands in for what there is not."""
    if call.q_pos is None or call.k_pos is None:
        return Given(k, v, q, q, q, steps(k), steps(v), (0, 0, 0), call.shape.M)
    q_pos, k_pos = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.q_pos, call.k_pos))
    pos_step, filled = (steps(q_pos)[0], *steps(k_pos)[:2]), call.filled is not None
    return Given(k, v, q_pos, k_pos, q, steps(k), steps(v), pos_step, call.shape.M, not filled, filled=filled)


@here
def run(launch: Launch, q: Tensor, given: Given, bias: Tensor | None, call: Call, Dv: int, lse: bool) -> Out:
    """The two kernels, on q's device."""
    B, H, G, N, _ = call.shape
    D, R, tile, table = q.shape[3], launch.rows, launch.tile, launch.table
    o = q.new_empty((B, H, N, Dv))
    sums = q.new_empty((B, H, N), dtype=torch.float32) if lse else None
    partial = launch.splits > 1
    # results of the programs, and behind them their log-sum-exps
    parts = q.new_empty(B * launch.programs * R * (Dv + 1), dtype=torch.float32) if partial else o
    bias_step: tuple[int, ...] = (0, 0, 1)
    if bias is not None:
        bias = bias if bias.stride(2) == 1 else bias.contiguous()
        bias_step = (*steps(bias)[:2], 1 if bias.shape[1] == H else H // G)
    counts, lists = [0] * LISTS, []
    for p, one in enumerate(launch.lists):
        batch, heads, lines, counts[p] = one.entries.shape
        lists.append((one.entries, int(batch > 1), heads, lines, H // heads, one.height))
    work, units, places, sinks, recents = table or (q, q, q, q, q)
    scales = [q if scale is None else scale for scale in (given.k_scale, given.v_scale)]
    scale_step = (0, 0, 0, 0) if scales[0] is scales[1] is q else tuple(n for t in scales for n in steps(t)[:2])
    BDV = power(Dv)
    # programmatic launch: a kernel is set up while the one before it is at work, and waits for it
    early = _launches_early(q.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}
    _decode[(launch.programs, B)](
        q, given.k, given.v, *scales, parts, o if sums is None else sums, q if bias is None else bias,
        given.q_pos, given.k_pos, sinks, recents, given.lengths, tuple(lists), work, units,
        call.softmax_scale(D) * 1.4426950408889634, launch.sink, launch.recent, N, given.M, launch.splits, *counts,
        H, G, steps(q), given.k_step, given.v_step, scale_step, bias_step, given.pos_step,
        D=D, DV=Dv, BD=power(D), BDV=BDV, R=R, T=tile.keys, HEADS=launch.heads, QUERIES=launch.queries,
        WINDOW=launch.window, FULL=table is None and launch.recent == EVERYTHING,
        BLOCK=tuple(one.block for one in launch.lists), CAUSAL=call.causal, BIAS=bias is not None, POS=given.holes,
        FILLED=given.filled, AT=given.by_address, K_INT=given.k_scale is not None, V_INT=given.v_scale is not None,
        TABLE=table is not None, PARTIAL=partial, LSE=lse, STAGES=tile.stages, EARLY=early,
        num_warps=tile.warps, **options,
    )  # fmt: skip
    if partial:
        # all parts of a row at once, so the more there are, the narrower a program's share of the row
        width = min(BDV, max(16, min(64, 8192 // power(launch.splits))))
        _merge[(H * N, B, -(-Dv // width))](
            parts, o, o if sums is None else sums, places, N, launch.splits, launch.programs, H,
            DV=Dv, BDV=width, R=R, S=power(launch.splits), HEADS=launch.heads, QUERIES=launch.queries,
            TABLE=table is not None, LSE=lse, EARLY=early, num_warps=4, **options,
        )  # fmt: skip
    return Out(o, sums)


def tile_for(q: Tensor, Dv: int, rows: int) -> Tile:
    """The shape of a step for so many query rows per kv head, as measured on an H200."""
    wide = power(max(q.shape[3], Dv))
    if not _roomy(q.device):
        return Tile(16, 16, 8, 2, 2) if q.element_size() == 4 else Tile(32, 32, 4, 2, 4)
    if q.element_size() == 4:
        return Tile(32, 16, 4, 3, 2) if wide <= 128 else Tile(16, 16, 8, 2, 2)
    if wide > 128:
        return Tile(32, 64, 4, 2, 4)
    if rows > 16:
        return Tile(64, 64, 4, 3, 2)
    return USUAL if wide == 128 else Tile(128, 64, 4, 2, 3)


def _for_few_blocks(tile: Tile, form: Form, call: Call, device: torch.device) -> Tile:
    """Where all that is read is a few blocks, one program per multiprocessor with more under way is faster."""
    window = not (isinstance(form.sink, int) and isinstance(form.recent, int)) or form.sink or form.recent
    if tile != USUAL or window or any(one.block % tile.keys for one in form.lists):
        return tile
    heads = [call.shape.G if one.entries.shape[1] in (1, call.shape.G) else call.shape.H for one in form.lists]
    read = sum(h * one.entries.shape[3] * one.block for h, one in zip(heads, form.lists, strict=True)) * call.shape.B
    return tile._replace(stages=4, programs=1) if read <= FEW * tile.keys * processors(device) else tile


@functools.cache
def _launches_early(device: torch.device) -> bool:
    """Can a kernel be set up while the one before it is at work? NVIDIA GPUs from Hopper on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def _roomy(device: torch.device) -> bool:
    """Has a multiprocessor the shared memory of a data centre's GPU? The steps for these take up to 115 KB of it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0), (10, 3))


def steps(t: Tensor) -> tuple[int, ...]:
    """The first three strides; an axis of one has none."""
    return tuple([0 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True)][:3])
