"""Blocks from pinned host memory to the device, by the GPU itself: it reads the host's memory at given addresses.

One launch brings any number of blocks from anywhere, and forms the checksum of each from what has arrived; copies by
the host would be one call for each block, or a gather in host memory before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.here import here

CHUNK = 2048  # words of a step


@triton.jit
def _bring(addresses, places, target, sums, W, CHUNK: tl.constexpr):
    """A block [W words] from its address to its place, and its sum."""
    i = tl.program_id(0)
    source = tl.load(addresses + i).to(tl.pointer_type(tl.int64))
    place = tl.load(places + i)
    total = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, W, CHUNK):
        at = start + tl.arange(0, CHUNK)
        there = at < W
        word = tl.load(source + at, mask=there, other=0)
        weight = ((at.to(tl.int64) * 2654435761) & 2147483647) * 2 + 1
        total += word * weight
        tl.store(target + place * W + at, word, mask=there)
    tl.store(sums + place, tl.sum(total, 0))


@here
def bring(addresses: Tensor, places: Tensor, target: Tensor, sums: Tensor) -> None:
    """Blocks at addresses [n] of pinned memory into places [n] of target [P,block,width], and their sums [P].

    Args:
        addresses: int64, on the device, of blocks as large as the target's, whole words of 8 bytes.
        places: int64, on the device.
        target: contiguous.
        sums: int64.
    """
    W = target[0].numel() * target.element_size() // 8
    flat = target.view(len(target), -1).view(torch.int64)
    _bring[(len(addresses),)](addresses, places, flat, sums, W, CHUNK=min(CHUNK, triton.next_power_of_2(W)))
