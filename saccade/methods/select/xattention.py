"""XAttention: the key blocks whose antidiagonals hold most of the mass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Pattern
from saccade.kernels.cover import cover
from saccade.kernels.topk import top_blocks
from saccade.methods.base import Selector, check_ints

TILE = 1 << 27  # most scores in a tile of the estimate
PIECES = 16  # tiles at least: each looks as far ahead as its last row


@dataclass(frozen=True)
class XAttention(Selector):
    """Antidiagonal block scores (Xu et al. 2025, arXiv 2503.16428, github.com/mit-han-lab/x-attention).

    Queries and keys are taken `stride` by `stride`; of each such square only the antidiagonal is summed, one product
    of vectors `stride` times as wide, which meets every column of the square and, as strides are even, every second of
    its diagonals. The softmax of these sums over the keys, added up in blocks, is the block's mass. A query block reads
    the first block, its own, and then the heaviest until the share `threshold` of the mass is reached.

    Args:
        threshold: share of the estimated mass that is read, above 0 and at most 1.
        stride: tokens in a side of the squares; the estimate costs 1/stride of dense attention's products.
        block: rows and slots in a block, a multiple of `stride`.
        most: key blocks that a query block reads at most, as a share of all; the heaviest stay.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Blocks [B,H,ceil(N/block),K], K = ceil(most * ceil(M/block)), -1 where the
        threshold needed fewer

    Departs from the paper: `most` bounds a row, and with it the memory of the lists; 1.0 is the paper. One threshold
    for all heads: what the paper finds for each head by dynamic programming, a plan says. In a chunk, the blocks that
    any of the query block's own positions stand in are all read.

    Example:
        >>> q, k = torch.ones(1, 1, 256, 1), torch.zeros(1, 1, 256, 1)
        >>> k[0, 0, 70] = 99.0
        >>> XAttention(stride=8, block=64, most=1.0).select(q, k, Call.of(q, k)).index[0, 0].tolist()
        [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1], [0, 1, 3, -1]]
    """

    phases = ("prefill",)
    strictly_causal = False  # all rows of a query block choose together
    chunked = "query blocks start at the chunk's first query, so other rows choose together"
    unbroken = True
    paper = "XAttention, ICML 2025, arXiv 2503.16428"

    threshold: float = 0.9
    stride: int = 8
    block: int = 128
    most: float = 0.25

    def __post_init__(self) -> None:
        check_ints(self, stride=1, block=1)
        if self.block % self.stride:
            raise InputError(f"XAttention: block must be a multiple of stride, got {self.block} and {self.stride}")
        for name in ("threshold", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
                raise InputError(f"XAttention: {name} must be a share in (0, 1], got {value!r}")

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "XAttention: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        with torch.no_grad():
            mass = antidiagonal_mass(q, k, call, self.stride, self.block)
            first = always_read(call, self.block, q.device)
            taken = cover(mass, self.threshold, first=first)
            scores = mass.masked_fill(~taken, float("-inf")).masked_fill(first, float("inf"))
            # a chunk at an odd offset stands in two blocks, and the first comes on top
            count = max(3, math.ceil(mass.shape[3] * self.most - 1e-9))
            return top_blocks(scores, count, self.block, self.block, call)

    def estimate(self, call: Call) -> float:
        B, H, _, _, _ = call.shape
        return float(B * H * self.stride * sum((b - a) * end for a, b, end in _tiles(call, self.stride, self.block)))


def antidiagonal_mass(q: Tensor, k: Tensor, call: Call, stride: int, block: int) -> Tensor:
    """Softmax mass of the strided antidiagonals, summed in blocks: [B,H,ceil(N/block),ceil(M/block)]."""
    B, H, G, N, M = call.shape
    nk, per = -(-M // block), block // stride
    # rows of a group in reverse order beside keys in order: their product is the sum along the antidiagonal
    queries = _groups(q, stride).flip(3).flatten(3) * (call.softmax_scale(q.shape[3]) / stride)
    keys = _groups(k, stride).flatten(3)
    found = []
    for a, b, end in _tiles(call, stride, block):
        rows = torch.arange(a, b, device=q.device)
        scores = queries[:, :, a:b].reshape(B, G, -1, queries.shape[3]) @ keys[:, :, :end].transpose(-1, -2)
        # a group of keys is seen when the last row of the group of queries sees its first
        last = ((rows + 1) * stride).clamp(max=N) - 1 + call.offset
        future = torch.arange(end, device=q.device) * stride > last[:, None]
        scores = scores.view(B, H, b - a, end).masked_fill(future, float("-inf"))
        probs = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))
        lines = -(-(b - a) // per)
        probs = torch.nn.functional.pad(probs, (0, nk * per - end, 0, lines * per - (b - a)))
        found.append(probs.view(B, H, lines, per, nk, per).sum((3, 5)))
    return torch.cat(found, 2)


def always_read(call: Call, block: int, device: torch.device) -> Tensor:
    """The first key block, and those that the query block's own positions stand in: booleans [query blocks, blocks]."""
    first = torch.arange(0, call.shape.N, block, device=device) + call.offset
    last = (first + block).clamp(max=call.shape.M) - 1
    at = torch.arange(-(-call.shape.M // block), device=device)
    return (at == 0) | ((at >= (first // block)[:, None]) & (at <= (last // block)[:, None]))


def _groups(x: Tensor, stride: int) -> Tensor:
    """[B,h,n,D] -> [B,h,ceil(n/stride),stride,D], the last group filled up with zeros."""
    B, h, n, D = x.shape
    return torch.nn.functional.pad(x, (0, 0, 0, -n % stride)).view(B, h, -1, stride, D)


def _tiles(call: Call, stride: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Groups of queries a to b, whole query blocks, and the number of groups of keys that the last of them sees."""
    B, H, _, N, M = call.shape
    groups, per = -(-N // stride), block // stride
    step = max(1, min(groups // PIECES, TILE // (B * H * -(-M // stride))) // per) * per
    for a in range(0, groups, step):
        b = min(a + step, groups)
        yield a, b, -(-(call.offset + min(b * stride, N)) // stride)
