"""The search of `tree_step` on a GPU: two launches for each halving, to judge blocks and to go on with the best.

Scores are float32, whatever the keys are. Ranges stay in order all the way, so that nothing is sorted: the best are
found by bisection of the scores' bits, as in `saccade.kernels.select.triton_topk`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.here import here

KEYS = 128  # keys that a program of the first kernel judges
WIDEST = 4096  # ranges of a query head that one program of the second kernel holds


def serves(q: Tensor, kept: int, block: int) -> bool:
    """Can the kernels search for this query?"""
    small = kept <= WIDEST and q.shape[3] <= 256 and block & (block - 1) == 0 and block <= KEYS
    return small and q.dtype in (torch.float32, torch.bfloat16, torch.float16)


@here
def search(
    q: Tensor, k: Tensor, start: int, stop: Tensor, kept: int, block: int, length: Tensor, now: Tensor, halvings: int
) -> Tensor:
    """As `tree_step`; `now` int64 [1], k with channels side by side."""
    B, H, _, D = q.shape
    ranges = torch.empty((3, B * H, kept), dtype=torch.int32, device=q.device)
    scores = torch.empty((2, B * H, kept), dtype=torch.float32, device=q.device)
    width = triton.next_power_of_2(max(16, kept))
    few = KEYS // block
    q = q.contiguous()
    for turn in range(halvings + 1):
        _judge[(triton.cdiv(kept, few), B * H)](
            q, k, ranges, scores, stop, length, now, *k.stride()[:3], H, H // k.shape[1], kept, start, B * H,
            D=D, WIDTH=triton.next_power_of_2(max(16, D)), FEW=few, BLOCK=block, FIRST=turn == 0, num_warps=4,
        )  # fmt: skip
        _go_on[(B * H,)](
            ranges, scores, now, kept, B * H, FIRST=turn == 0, LAST=turn == halvings, WIDTH=width,
            num_warps=max(1, min(16, width // 128)),
        )  # fmt: skip
    return ranges[2].view(B, H, 1, kept)


@triton.jit(do_not_specialize=["kept", "start", "lines"])
def _judge(
    q, k, ranges, scores, stop, length, now, step_b, step_g, step_n, H, share, kept, start, lines,
    D: tl.constexpr, WIDTH: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The largest product of the query with any key of the first block of some ranges' right halves.

    ranges [3,lines,kept]: begin and end of each range, and what `_go_on` leaves at last. The first time ranges are
    cut here, and it is their first blocks that are judged.
    """
    line = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * FEW + tl.arange(0, FEW)
    real = at < kept
    if FIRST:
        span, wanted = tl.maximum(tl.load(stop) - start, 0), tl.load(now)
        low = (start + span * tl.minimum(at, wanted) // wanted).to(tl.int32)
        high = (start + span * tl.minimum(at + 1, wanted) // wanted).to(tl.int32)
        tl.store(ranges + line * kept + at, low, mask=real)
        tl.store(ranges + (lines + line) * kept + at, high, mask=real)
        block = low
    else:
        low = tl.load(ranges + line * kept + at, mask=real, other=0)
        high = tl.load(ranges + (lines + line) * kept + at, mask=real, other=0)
        block = low + (high - low) // 2
    d = tl.arange(0, WIDTH)
    row = tl.load(q + line * D + d, mask=d < D, other=0.0).to(tl.float32)
    # key by key, FEW blocks of BLOCK keys
    i = tl.arange(0, FEW * BLOCK)
    mine = tl.program_id(0) * FEW + i // BLOCK
    if FIRST:
        first = (start + span * tl.minimum(mine, wanted) // wanted).to(tl.int32)
        last = (start + span * tl.minimum(mine + 1, wanted) // wanted).to(tl.int32)
    else:
        a = tl.load(ranges + line * kept + mine, mask=mine < kept, other=0)
        last = tl.load(ranges + (lines + line) * kept + mine, mask=mine < kept, other=0)
        first = a + (last - a) // 2
    slot = first * BLOCK + i % BLOCK
    there = (mine < kept) & (first < last) & (slot < tl.load(length).to(tl.int32))
    base = k + line // H * step_b + line % H // share * step_g
    keys = tl.load(base + slot.to(tl.int64)[:, None] * step_n + d[None], mask=there[:, None] & (d < D)[None], other=0.0)
    product = tl.sum(keys.to(tl.float32) * row[None], 1)
    product = tl.where(there, product, float("-inf"))
    best = tl.max(tl.reshape(product, (FEW, BLOCK)), 1)
    best = tl.where(block < high, best, float("-inf"))
    tl.store(scores + (lines + line) * kept + at, best, mask=real)


@triton.jit(do_not_specialize=["kept", "lines"])
def _go_on(
    ranges, scores, now, kept, lines, FIRST: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The best of all halves become the ranges, in order; `scores` [2,lines,kept]: of ranges, and of right halves."""
    line = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    real = at < kept
    low = tl.load(ranges + line * kept + at, mask=real, other=0)
    high = tl.load(ranges + (lines + line) * kept + at, mask=real, other=0)
    right = tl.load(scores + (lines + line) * kept + at, mask=real, other=float("-inf"))
    if FIRST:
        tl.store(scores + line * kept + at, right, mask=real)
    else:
        middle = low + (high - low) // 2
        left = tl.load(scores + line * kept + at, mask=real, other=float("-inf"))
        # a range of one block has no left half
        left = tl.where(middle > low, left, float("-inf"))
        left_key, right_key = _ordered(left), _ordered(right)
        left_in, right_in = left > float("-inf"), right > float("-inf")
        wanted = tl.minimum(
            tl.sum(left_in.to(tl.int32), 0) + tl.sum(right_in.to(tl.int32), 0), tl.load(now).to(tl.int32)
        )
        top = tl.maximum(tl.max(left_key, 0), tl.max(right_key, 0)).to(tl.int64)
        least = tl.minimum(
            tl.min(tl.where(left_in, left_key, 2147483647), 0), tl.min(tl.where(right_in, right_key, 2147483647), 0)
        ).to(tl.int64)
        least = tl.minimum(least, top)
        # at least as many as wanted are at `least` or above, fewer above `top`
        while least < top:
            half = least + (top - least + 1) // 2
            many = tl.sum((left_key >= half).to(tl.int32), 0) + tl.sum((right_key >= half).to(tl.int32), 0)
            enough = many >= wanted
            least = tl.where(enough, half, least)
            top = tl.where(many == wanted, least, tl.where(enough, top, half - 1))
        left_more, right_more = left_in & (left_key > least), right_in & (right_key > least)
        left_same, right_same = left_in & (left_key == least), right_in & (right_key == least)
        spare = wanted - tl.sum(left_more.to(tl.int32), 0) - tl.sum(right_more.to(tl.int32), 0)
        same = left_same.to(tl.int32) + right_same.to(tl.int32)
        before = tl.cumsum(same, 0) - same
        left_in = left_more | (left_same & (before < spare))
        right_in = right_more | (right_same & (before + left_same.to(tl.int32) < spare))
        many = left_in.to(tl.int32) + right_in.to(tl.int32)
        place = tl.cumsum(many, 0) - many
        # everything is read before anything is written over
        tl.debug_barrier()
        out = ranges + line * kept + place
        tl.store(out, low, mask=left_in)
        tl.store(out + lines * kept, middle, mask=left_in)
        tl.store(scores + line * kept + place, left, mask=left_in)
        out += left_in.to(tl.int32)
        tl.store(out, middle, mask=right_in)
        tl.store(out + lines * kept, high, mask=right_in)
        tl.store(scores + line * kept + place + left_in.to(tl.int32), right, mask=right_in)
        empty = real & (at >= wanted)
        tl.store(ranges + line * kept + at, 0, mask=empty)
        tl.store(ranges + (lines + line) * kept + at, 0, mask=empty)
        tl.store(scores + line * kept + at, float("-inf"), mask=empty)
    if LAST:
        tl.debug_barrier()
        low = tl.load(ranges + line * kept + at, mask=real, other=0)
        high = tl.load(ranges + (lines + line) * kept + at, mask=real, other=0)
        full = real & (low < high)
        place = tl.cumsum(full.to(tl.int32), 0) - 1
        count = tl.sum(full.to(tl.int32), 0)
        out = ranges + (2 * lines + line) * kept
        tl.store(out + place, low, mask=full)
        tl.store(out + at, -1, mask=real & (at >= count))


@triton.jit
def _ordered(x):
    """The bits of floats as integers in the same order; -0 is 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
