"""The lists of a backward pass: what each query block reads, and, transposed, which query blocks read a key block.

Both kinds of list are parted in two: entries whose pairs all count, which need no mask, and the others. Everything is
made on the device, without a wait. On the way there is one bit for each pair of blocks, next to nothing beside the
scores that these pairs stand for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.kernels.attend.lower import Lowered
from saccade.kernels.here import here

CHUNK = 128  # entries of a list looked at in one go
BITS = 512  # pairs of blocks looked at in one go


class Readers(NamedTuple):
    """Lists of key blocks per query block, and their transpose.

    Shapes: order [lines, K], lines = B|1 * lists * query blocks: whole entries from the front, the others from the
    back; split [lines, 2] how many of each. rows [lines * K]: the query blocks of each key block, whole entries first,
    both ascending; runs [B|1 * lists * key blocks, 3]: where in rows, how many whole ones, how many others.
    """

    order: Tensor
    split: Tensor
    rows: Tensor
    runs: Tensor


def readers(lowered: Lowered, N: int, M: int, causal: bool, whole: bool) -> Readers:
    """Part the lists of a lowered pattern and transpose them.

    Args:
        lowered: a pattern with an index; windows count before blocks, so what a window covers is dropped.
        N, M: queries and keys.
        causal: the call's causality.
        whole: False if every entry needs a mask (positions were given, or tiles do not divide the blocks).
    """
    assert lowered.index is not None
    return _listed(lowered.index.contiguous(), lowered, N, M, causal, whole)


@here
def _listed(index: Tensor, lowered: Lowered, N: int, M: int, causal: bool, whole: bool) -> Readers:
    B, L, nq, K = index.shape
    nk, words = -(-M // lowered.block_k), -(-nq // 32)
    order, split, rows, runs = (
        torch.empty(shape, dtype=torch.int32, device=index.device)
        for shape in ((B * L * nq, K), (B * L * nq, 2), (B * L * nq * K,), (B * L * nk, 3))
    )
    # a bit for each query block of a whole or masked entry, and how much of `rows` is taken
    bits = torch.zeros(B * L * nk * 2 * words + 1, dtype=torch.int32, device=index.device)
    _part[(B * L * nq,)](
        *(index, order, split, bits, lowered.sink, lowered.recent, N, M, L, nq, nk, words, K, lowered.block_q),
        lowered.block_k,
        CAUSAL=causal,
        WHOLE=whole,
        WINDOWS=lowered.windows,
        CHUNK=min(CHUNK, triton.next_power_of_2(K)),
        num_warps=1,
    )
    _turn[(B * L * nk,)](bits, bits[-1:], rows, runs, nq, words, BITS=BITS, num_warps=2)
    return Readers(order, split, rows, runs)


@triton.jit(do_not_specialize=["N", "M", "L", "nq", "nk", "words", "K", "block_q", "block_k"])
def _part(
    index,
    order,
    split,
    bits,
    sinks,
    recents,
    N,
    M,
    L,
    nq,
    nk,
    words,
    K,
    block_q,
    block_k,
    CAUSAL: tl.constexpr,
    WHOLE: tl.constexpr,
    WINDOWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One list: drop what no row sees or what its window covers anyway, part the rest, and set its bits."""
    line = tl.program_id(0)
    qb, head = line % nq, line // nq
    sink, recent = 0, 0
    if WINDOWS:
        sink, recent = tl.load(sinks + head % L), tl.load(recents + head % L)
    first = qb * block_q + M - N
    last = tl.minimum(first + block_q, M) - 1
    base = line.to(tl.int64) * K
    front, back = 0, 0
    for at in range(0, K, CHUNK):
        column = at + tl.arange(0, CHUNK)
        block = tl.load(index + base + column, mask=column < K, other=-1)
        start = block * block_k
        stop = start + block_k - 1
        keep = block >= 0
        full = keep & WHOLE
        if WHOLE:
            # the nearest and the furthest pair of this query block and that key block
            near = tl.maximum(tl.maximum(first - stop, start - last), 0)
            far = tl.maximum(tl.abs(last - start), tl.abs(stop - first))
            keep = keep & (stop >= sink) & (far >= recent)
            full = (start >= sink) & (near >= recent)
            if CAUSAL:
                keep = keep & (start <= last)
                full = full & (stop <= first)
            else:
                full = full & (stop < M)
            full = full & keep
        masked = keep & ~full
        ahead = tl.cumsum(full.to(tl.int32), 0) - 1
        behind = tl.cumsum(masked.to(tl.int32), 0) - 1
        place = tl.where(full, front + ahead, K - 1 - back - behind)
        tl.store(order + base + place, block, mask=keep)
        run = (head.to(tl.int64) * nk + block) * 2 + masked.to(tl.int64)
        # a bit is set, whoever comes first
        tl.atomic_or(bits + run * words + qb // 32, tl.full([CHUNK], 1, tl.int32) << (qb % 32), mask=keep)
        front += tl.sum(full.to(tl.int32), 0)
        back += tl.sum(masked.to(tl.int32), 0)
    tl.store(split + 2 * line, front)
    tl.store(split + 2 * line + 1, back)


@triton.jit(do_not_specialize=["nq", "words"])
def _turn(bits, taken, rows, runs, nq, words, BITS: tl.constexpr):
    """The query blocks of one key block, from its bits. Where they lie may differ from run to run, not their order."""
    block = tl.program_id(0)
    bits += block.to(tl.int64) * 2 * words
    whole, masked = 0, 0
    for at in range(0, nq, BITS):
        row = at + tl.arange(0, BITS)
        one = tl.load(bits + row // 32, mask=row < nq, other=0) >> (row % 32)
        two = tl.load(bits + words + row // 32, mask=row < nq, other=0) >> (row % 32)
        whole += tl.sum(one & 1, 0)
        masked += tl.sum(two & 1, 0)
    begin = tl.atomic_add(taken, whole + masked)
    tl.store(runs + 3 * block, begin)
    tl.store(runs + 3 * block + 1, whole)
    tl.store(runs + 3 * block + 2, masked)
    rows += begin
    done_whole, done_masked = 0, whole
    for at in range(0, nq, BITS):
        row = at + tl.arange(0, BITS)
        one = (tl.load(bits + row // 32, mask=row < nq, other=0) >> (row % 32)) & 1
        two = (tl.load(bits + words + row // 32, mask=row < nq, other=0) >> (row % 32)) & 1
        tl.store(rows + done_whole + tl.cumsum(one, 0) - 1, row, mask=one > 0)
        tl.store(rows + done_masked + tl.cumsum(two, 0) - 1, row, mask=two > 0)
        done_whole += tl.sum(one, 0)
        done_masked += tl.sum(two, 0)
