"""Hyper: queries meet the keys of their own hash bucket exactly, and all others through a random sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.kernels.attend import attend
from saccade.kernels.attend.tile import run, softmax, tile_size
from saccade.kernels.merge import Out, merge
from saccade.methods.base import Attention

WORD = 0xFFFFFFFF  # 32 bits
ROWS = 64  # queries in a line where all keys are read


@dataclass(frozen=True)
class HyperAttention(Attention):
    """Near-linear attention by hashing and sampling (Han et al. 2023, arXiv 2310.05869, github.com/insuhan/hyper-attn).

    Queries and keys are sorted by the signs of a few random projections and cut into as many blocks; a block of
    queries attends its block of keys exactly. What lies outside of it is estimated from `samples` keys drawn evenly
    with replacement, each standing for as many as there are keys to a sample; the two meet by their log-sum-exp.
    Causal attention is split in halves: the second half of the queries meets the first half of the keys in this way,
    and each half by itself is split again, down to `exact_below` tokens. The answer is no softmax over a set of keys,
    so there is no pattern to draw; `estimate` counts all its products.

    Args:
        block: keys in a sorted block.
        samples: keys drawn for each head and pair of halves; 0 = only the blocks.
        bits: random projections, 1 to 30; there are 2^bits buckets.
        exact_below: tokens up to which attention is dense.
        seed: of projections and samples, with the layer and the head; `call.rng`, where there is one, takes its place.

    Shapes:
        q [B,H,N,D], k [B,G,M,D], v [B,G,M,Dv] -> Out(o [B,H,N,Dv], lse [B,H,N])

    Departs from the paper: samples are drawn evenly, as in the official code, where the theory draws by the norm of
    values; buckets stand in the order in which neighbours differ in one bit, which the official table misses; a short
    last block is not filled with zeros; key heads are sorted once for all their query heads. All batch rows share the
    draws.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 4096, 8)
        >>> call, method = Call.of(q, k), HyperAttention(block=64, samples=64, exact_below=256)
        >>> method.attend(q, k, v, call).o.shape, round(method.estimate(call) / (2 * 4096 * 4097 / 2), 2)
        (torch.Size([1, 2, 4096, 8]), 0.2)
    """

    phases = ("prefill",)
    strictly_causal = False  # where a query is sorted to depends on the queries of its half
    chunked = "every chunk is split, sorted and drawn for anew"
    unbroken = True
    paper = "HyperAttention, ICLR 2024, arXiv 2310.05869"

    block: int = 256
    samples: int = 256
    bits: int = 7
    exact_below: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("block", 1, None),
            ("samples", 0, None),
            ("bits", 1, 30),
            ("exact_below", 1, None),
            ("seed", 0, None),
        ):
            value = getattr(self, name)
            fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= (high or value)
            if not fits:
                span = f">= {low}" if high is None else f"from {low} to {high}"
                raise InputError(f"HyperAttention: {name} must be an int {span}, got {value!r}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Out:
        call.check(q, k, v, name="HyperAttention")
        if not call.contiguous:
            raise UnsupportedError("HyperAttention: needs a store without holes or padding; run such rows one by one")
        start = self._start(call, q.device)
        if not call.causal:
            return self._across(q, k, v, call, start, 0)
        if self.exact_below >= call.shape.M:
            return attend(q, k, v, call=call)
        past = call.offset
        own = self._causal(q, k[:, :, past:], v[:, :, past:], call, start, past)
        if past == 0:
            return own
        return merge([own, self._across(q, k[:, :, :past], v[:, :, :past], call, start, 0)])

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        if not call.causal:
            return float(B * H * self._pairs_across(N, M))
        if self.exact_below >= M:
            return float(B * H * (N * call.offset + N * (N + 1) // 2))
        return float(B * H * (self._pairs(N) + (self._pairs_across(N, call.offset) if call.offset else 0)))

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, call: Call, start: Tensor, at: int) -> Out:
        """Causal attention of the tokens from position `at` on among themselves."""
        n = q.shape[2]
        if n <= self.exact_below:
            part = Call.of(q, k, layer=call.layer, heads=call.heads, scale=call.scale)
            return attend(q, k, v, call=part)
        half = (n + 1) // 2
        first = self._causal(q[:, :, :half], k[:, :, :half], v[:, :, :half], call, start, at)
        second = self._causal(q[:, :, half:], k[:, :, half:], v[:, :, half:], call, start, at + half)
        second = merge([second, self._across(q[:, :, half:], k[:, :, :half], v[:, :, :half], call, start, at)])
        assert first.lse is not None and second.lse is not None
        return Out(torch.cat((first.o, second.o), 2), torch.cat((first.lse, second.lse), 2))

    def _across(self, q: Tensor, k: Tensor, v: Tensor, call: Call, start: Tensor, at: int) -> Out:
        """Attention of queries to keys all of which they may see; the keys begin at position `at`."""
        (B, H, n, D), (G, m) = q.shape, k.shape[1:3]
        scale, blocks = call.softmax_scale(D), -(-m // self.block)
        if m < self.exact_below or blocks == 1:
            return _in_lines(q * scale, k[:, :, None], v[:, :, None], min(n, ROWS))
        rows = -(-n // blocks)
        to = normal(start, (D, self.bits))
        queries, keys = (buckets(t, to).argsort(stable=True, dim=-1) for t in (q, k))
        q, k, v = (t.gather(2, i[..., None].expand(t.shape)) for t, i in ((q * scale, queries), (k, keys), (v, keys)))
        # the sorted keys in blocks; the last one is filled up with slots that nobody reads
        lines, fill = -(-n // rows), blocks * self.block - m
        cut = [torch.nn.functional.pad(t, (0, 0, 0, fill)).unflatten(2, (blocks, -1))[:, :, :lines] for t in (k, v)]
        slots = torch.arange(blocks * self.block, device=q.device).view(blocks, -1)[:lines]
        out = _in_lines(q, *cut, rows, (slots >= m)[None])
        if self.samples:
            heads = head_numbers(call, q.device)
            drawn = integers(start, heads, at, self.samples, m)  # [H, samples]
            mine = drawn + torch.arange(H, device=q.device)[:, None] // (H // G) * m
            some = [t.reshape(B, G * m, -1).index_select(1, mine.flatten()).unflatten(1, (H, 1, -1)) for t in (k, v)]
            # a sample from a query's own block is left out for it: the block itself was answered exactly
            own = (drawn // self.block)[:, None] == torch.arange(lines, device=q.device)[:, None]
            far = _in_lines(q, *some, rows, own)
            assert far.lse is not None
            out = merge([out, Out(far.o, far.lse + math.log(m / self.samples))])
        back = queries.argsort(-1)
        assert out.lse is not None
        return Out(out.o.gather(2, back[..., None].expand(out.o.shape)), out.lse.gather(2, back))

    def _start(self, call: Call, device: torch.device) -> Tensor:
        """Where this layer's draws begin: a 0-d integer."""
        if call.rng is not None:
            return torch.randint(WORD, (), generator=call.rng, device=call.rng.device).to(device)
        return scrambled(torch.full((), (self.seed * 6_700_417 + call.layer * 65_537) & WORD, device=device))

    def _pairs(self, n: int) -> int:
        """Products of causal attention among n tokens."""
        if n <= self.exact_below:
            return n * (n + 1) // 2
        half = (n + 1) // 2
        return self._pairs(half) + self._pairs(n - half) + self._pairs_across(n - half, half)

    def _pairs_across(self, n: int, m: int) -> int:
        """Products of n queries with m keys; a projection counts as one."""
        if m < self.exact_below or m <= self.block:
            return n * m
        rows = -(-n // -(-m // self.block))
        exact = sum(min(rows, n - a) * min(self.block, m - i * self.block) for i, a in enumerate(range(0, n, rows)))
        return exact + n * self.samples + (n + m) * self.bits


def _in_lines(q: Tensor, k: Tensor, v: Tensor, rows: int, hidden: Tensor | None = None) -> Out:
    """Softmax attention of lines of `rows` queries, some lines at a time.

    Shapes: q [B,H,n,D], scaled; k [B,h,lines|1,W,D], v [B,h,lines|1,W,Dv], h = G or H; hidden [1|H,lines,W] -> as q.
    """
    B, H, n, _ = q.shape
    h, W = k.shape[1], k.shape[3]
    lines = -(-n // rows)
    q = torch.nn.functional.pad(q, (0, 0, 0, lines * rows - n)).unflatten(2, (lines, rows))
    # query heads that share a key head lie one below the other in a line
    q = q.unflatten(1, (h, H // h)).transpose(2, 3).flatten(3, 4)
    step = max(1, tile_size(q.device) // (B * H * rows * W))
    outs = []
    for a in range(0, lines, step):
        here = slice(a, min(a + step, lines))
        near = [t[:, :, here] if t.shape[2] > 1 else t for t in (k, v)]
        mask = None if hidden is None else hidden[:, here, None].unsqueeze(0)

        def tile(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = mask) -> Out:
            scores = q @ k.transpose(-1, -2)
            # not -inf: a line may have drawn from its own block only, and to look for that the host would wait
            scores = scores if mask is None else scores.masked_fill(mask, torch.finfo(scores.dtype).min)
            return softmax(scores, v, lse=True, careful=False)

        outs.append(run(tile, q[:, :, here], *near))
    sums = torch.cat([out.lse for out in outs if out.lse is not None], 2)[..., None]
    o, lse = (
        t.unflatten(3, (H // h, rows)).transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :, :n]
        for t in (torch.cat([out.o for out in outs], 2), sums)
    )
    return Out(o, lse.squeeze(-1))


def buckets(x: Tensor, to: Tensor) -> Tensor:
    """Bucket [B,h,n] of vectors [B,h,n,D] by the signs of projections [D,bits]; the next one differs in one sign."""
    bits = to.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)  # a sign that rounding turns moves everything behind it
    signs = x.detach().to(wide) @ to.to(wide) > 0
    rank = (signs << torch.arange(bits, device=x.device)).sum(-1)
    # the place of a code word in Gray's order
    for shift in (1, 2, 4, 8, 16):
        rank = rank ^ (rank >> shift)
    return rank


def scrambled(x: Tensor) -> Tensor:
    """Counters -> well mixed numbers, 32 bits in int64: the same on every device, and nobody is waited for."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & WORD
    return (x >> 16) ^ x


def integers(start: Tensor, heads: Tensor, at: int, count: int, high: int) -> Tensor:
    """Even draws from 0 to high - 1, [len(heads), count]; a head's do not depend on which others there are."""
    seeds = scrambled(scrambled((start + 2 + heads * 0x9E3779B1) & WORD) ^ at)
    counter = torch.arange(count, device=start.device)
    return (scrambled((seeds[:, None] + counter) & WORD) * high) >> 32


def normal(start: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draws from a normal distribution."""
    counter = torch.arange(math.prod(shape), device=start.device).view(shape)
    seeds = (scrambled((start + i) & WORD) for i in (0, 1))
    one, two = ((scrambled((seed + counter) & WORD).double() + 0.5) / (WORD + 1) for seed in seeds)
    return (-2 * one.log()).sqrt() * (2 * math.pi * two).cos()


def head_numbers(call: Call, device: torch.device) -> Tensor:
    """The numbers in the model of a call's query heads."""
    low = call.heads[0]
    if call.heads == tuple(range(low, low + len(call.heads))):
        # made where it is used: the host would wait for a list that is sent there
        return torch.arange(low, low + len(call.heads), device=device)
    return torch.tensor(call.heads, device=device)
