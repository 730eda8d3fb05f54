"""Summaries of blocks in one pass over the rows: mean, smallest and largest, accumulated in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.here import here

HELD = 1 << 14  # numbers of a block held at once


@here
def pool(x: Tensor, block: int, mean: bool = True, bounds: bool = False) -> tuple[Tensor | None, ...]:
    """x [B,h,N,D], any strides -> (mean, smallest, largest), each [B,h,ceil(N/block),D] in x's dtype or None."""
    B, h, N, D = x.shape
    count = -(-N // block)
    shape = (B, h, count, D)
    out = [torch.empty(shape, device=x.device, dtype=x.dtype) if made else None for made in (mean, bounds, bounds)]
    unused, width = x.new_zeros(1), triton.next_power_of_2(D)
    _pool[(count, B * h)](
        x,
        *(unused if t is None else t for t in out),
        *x.stride(),
        h,
        N,
        D,
        count,
        BLOCK=block,
        ROWS=max(1, min(HELD // width, triton.next_power_of_2(block))),
        WIDTH=width,
        MEAN=mean,
        BOUNDS=bounds,
        # few threads with many rows each: a sum over rows then stays within a thread for most of them
        num_warps=2,
    )
    return tuple(out)


@triton.jit(do_not_specialize=["h", "N", "count"])
def _pool(
    x,
    mean,
    low,
    high,
    sb,
    sh,
    sn,
    sd,
    h,
    N,
    D,
    count,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN: tl.constexpr,
    BOUNDS: tl.constexpr,
):
    block, line = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    x += line // h * sb + line % h * sh + block * BLOCK * sn
    rows, width = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    left = tl.minimum(N - block * BLOCK, BLOCK)
    total = tl.zeros([WIDTH], tl.float32)
    least = tl.full([WIDTH], float("inf"), tl.float32)
    most = tl.full([WIDTH], float("-inf"), tl.float32)
    for start in range(0, BLOCK, ROWS):
        at = start + rows
        real = (at < left)[:, None] & (width < D)[None, :]
        tile = tl.load(x + at[:, None].to(tl.int64) * sn + width[None, :] * sd, mask=real, other=0.0).to(tl.float32)
        if MEAN:
            total += tl.sum(tile, 0)
        if BOUNDS:
            least = tl.minimum(least, tl.min(tl.where(real, tile, float("inf")), 0))
            most = tl.maximum(most, tl.max(tl.where(real, tile, float("-inf")), 0))
    out = (line * count + block) * D + width
    if MEAN:
        tl.store(mean + out, (total / left).to(mean.dtype.element_ty), mask=width < D)
    if BOUNDS:
        tl.store(low + out, least.to(low.dtype.element_ty), mask=width < D)
        tl.store(high + out, most.to(high.dtype.element_ty), mask=width < D)
