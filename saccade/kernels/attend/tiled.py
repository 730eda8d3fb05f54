"""attend in plain PyTorch: gather what a tile of queries reads, one matmul, softmax, one matmul. Any device, trainable.

A tile holds so many scores that it stays in cache. Whatever is not contiguous (evicted stores, padded rows)
takes the masked path, which is exact for every pattern. A union is the merge of its parts, each without the pairs of
the parts before it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.core.call import Call, kv_heads
from saccade.core.pattern import Blocks, Full, Pattern, PerHead, Tokens, Union, Window, per_head
from saccade.kernels.attend.blocks import attend_blocks
from saccade.kernels.attend.tile import NEG_INF, Job, run, softmax, tile_size
from saccade.kernels.merge import Out, merge

PACKED = 16  # up to so many queries, the query heads that share a key head are packed into one matmul


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call: Call, bias: Tensor | None, lse: bool) -> Out:
    """As `saccade.kernels.attend.attend`, on checked arguments."""
    if bias is not None:
        bias = per_head(bias, call).expand(call.shape.B, call.shape.H, -1)
    return _attend(Job(q * call.softmax_scale(q.shape[3]), k, v, call, bias, lse), pattern)


def _attend(job: Job, pattern: Pattern) -> Out:
    """The way for a pattern."""
    if isinstance(pattern, PerHead):
        return _per_head(job, pattern)
    if isinstance(pattern, Union):
        parts = pattern.parts
        return merge([_attend(replace(job, lse=True, without=job.without + parts[:i]), p) for i, p in enumerate(parts)])
    if isinstance(pattern, Window) and (isinstance(pattern.sink, Tensor) or isinstance(pattern.recent, Tensor)):
        return _per_head(job, _by_size(pattern, job.call))
    if not job.call.contiguous:
        return _masked(job, pattern)
    if isinstance(pattern, Blocks) and min(PACKED, pattern.block_q) >= job.call.shape.N:
        return _tokens(job, _slots(pattern, job.call))
    if isinstance(pattern, Blocks):
        return attend_blocks(job, pattern)
    if isinstance(pattern, Tokens):
        return _tokens(job, pattern)
    if not job.without and job.call.causal and job.bias is None:
        if isinstance(pattern, Window):
            return _window(job, pattern)
        if isinstance(pattern, Full):
            return _full(job)
    return _masked(job, pattern)


def _full(job: Job) -> Out:
    """Causal dense attention. SDPA where it can; tiles of rows where there is a past or the lse is wanted."""
    q, k, v, call, lse = job.q, job.k, job.v, job.call, job.lse
    B, H, G, N, M = call.shape
    if N == M and not lse and q.shape[3] == v.shape[3]:
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=H != G)
        return Out(o)
    step = N if N <= PACKED else max(1, min(64, tile_size(q.device) // (B * H * M)))
    outs = []
    for a in range(0, N, step):
        b = min(a + step, N)
        hi = call.offset + b
        future = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).triu(1) if b - a > 1 else None

        def tile(q: Tensor, k: Tensor, v: Tensor, future: Tensor | None = future, n: int = b - a) -> Out:
            scores = _scores(q, k)
            if future is not None:
                tail = scores.view(B, G, H // G, n, -1)[..., -n:]
                tail.masked_fill_(future, NEG_INF)
            return softmax(scores, v, lse)

        packed = q[:, :, a:b].reshape(B, G, H // G * (b - a), -1)
        out = run(tile, packed, k[:, :, :hi], v[:, :, :hi])
        outs.append(_unpack(out, B, H, b - a))
    return _rows(outs)


def _window(job: Job, pattern: Window) -> Out:
    """Sink and band are slices, nothing is gathered."""
    q, k, v, call, lse = job.q, job.k, job.v, job.call, job.lse
    B, H, G, N, M = call.shape
    sink, recent = int(pattern.sink), int(pattern.recent)
    step = N if N <= PACKED else 256
    outs = []
    for a in range(0, N, step):
        b = min(a + step, N)
        lo, hi = max(0, call.offset + a - recent + 1), call.offset + b
        lo = 0 if lo <= sink else lo
        far = min(sink, lo)
        rows = torch.arange(call.offset + a, hi, device=q.device)[:, None]
        keys = torch.arange(lo, hi, device=q.device)[None]
        hidden = (keys > rows) | ((rows - keys >= recent) & (keys >= sink))

        def tile(q: Tensor, k: Tensor, v: Tensor, far: int = far, hidden: Tensor = hidden, n: int = b - a) -> Out:
            scores = _scores(q, k)
            band = scores.view(B, G, H // G, n, -1)[..., far:]
            band.masked_fill_(hidden, NEG_INF)
            return softmax(scores, v, lse)

        near = [t[:, :, lo:hi] if far == 0 else torch.cat((t[:, :, :far], t[:, :, lo:hi]), 2) for t in (k, v)]
        out = run(tile, q[:, :, a:b].reshape(B, G, H // G * (b - a), -1), *near)
        outs.append(_unpack(out, B, H, b - a))
    return _rows(outs)


def _tokens(job: Job, pattern: Tokens) -> Out:
    """Gather single tokens: once for all rows, or anew for each row."""
    q, k, v, call, bias, lse = job.q, job.k, job.v, job.call, job.bias, job.lse
    B, H, G, N, M = call.shape
    index = per_head(pattern.index, call).long()
    shared = index.shape[2] == 1
    index = index.expand(B, H, -1, -1)
    K = index.shape[3]
    # the store's tensors have room behind their tokens: index them as they are, a reshape would copy them
    batch = torch.arange(B, device=q.device)[:, None, None, None]
    head = (torch.arange(H, device=q.device) // (H // G))[:, None, None]
    block = next((p.block_q for p in job.without if isinstance(p, Blocks)), 64)
    step = max(1, tile_size(q.device) // (B * H * K * (1 if shared else q.shape[3])))
    step = step if step >= N else max(block, step // block * block)
    outs = []
    for a in range(0, N, step):
        b = min(a + step, N)
        mine = index if shared else index[:, :, a:b]
        rows = torch.arange(a, b, device=q.device)
        hidden = _columns(job, rows, mine, block) if shared else _singles(job, rows, mine)
        extra = None
        if bias is not None:
            extra = bias.gather(2, mine.clamp_min(0).flatten(2)).view(mine.shape)
        where = mine.clamp_min(0)

        def tile(
            q: Tensor, k: Tensor, v: Tensor, extra: Tensor | None, where: Tensor = where, hidden: Tensor = hidden
        ) -> Out:
            keys, values = (t[batch, head, where] for t in (k, v))
            if shared:
                scores = _scores(q, keys[:, :, 0])
            else:
                scores = (q[..., None, :] @ keys.transpose(-1, -2)).squeeze(-2)
            if extra is not None:
                scores = scores + extra
            scores.masked_fill_(hidden, NEG_INF)
            if shared:
                return softmax(scores, values[:, :, 0], lse)
            out = softmax(scores[..., None, :], values, lse)
            return Out(out.o.squeeze(-2), None if out.lse is None else out.lse.squeeze(-1))

        outs.append(run(tile, q[:, :, a:b], k, v, extra))
    return _rows(outs)


def _slots(pattern: Blocks, call: Call) -> Tokens:
    """The slots of the blocks that one query block reads."""
    index = pattern.index.long()[..., None] * pattern.block_k + torch.arange(
        pattern.block_k, device=pattern.index.device
    )
    return Tokens(index.masked_fill(index >= call.shape.M, -1).clamp_min(-1).flatten(3))


def _singles(job: Job, rows: Tensor, slots: Tensor) -> Tensor:
    """Which of each row's own slots [B,H,n,K] it may not use."""
    hidden = slots < 0
    if job.call.causal:
        hidden = hidden | (slots > rows[:, None] + job.call.offset)
    for part in job.without:
        hidden = hidden | part.member(job.call, rows, slots.clamp_min(0))
    return hidden


def _columns(job: Job, rows: Tensor, slots: Tensor, block: int) -> Tensor:
    """Which of the shared slots [B,H,1,K] a row may not use [B,H,n,K]; asked once per block of rows where it can."""
    wide = not (job.call.causal and len(rows) > block and all(isinstance(p, Blocks) for p in job.without))
    if wide or any(p.block_q != block for p in job.without if isinstance(p, Blocks)):
        return _singles(job, rows, slots.expand(-1, -1, len(rows), -1) if job.without else slots)
    first = rows[::block]
    last = (first + block - 1).clamp(max=int(rows[-1])) + job.call.offset
    hidden = (slots < 0) | (slots > last[:, None])
    for part in job.without:
        hidden = hidden | part.member(job.call, first, slots.clamp_min(0))
    split = ~hidden & (slots > first[:, None] + job.call.offset)
    hidden = hidden.repeat_interleave(block, dim=2)[:, :, : len(rows)]
    return hidden | (slots > rows[:, None] + job.call.offset) if bool(split.any()) else hidden


def _masked(job: Job, pattern: Pattern) -> Out:
    """Dense scores under a mask, some rows at a time: right for every pattern and every store."""
    q, k, v, call, bias, lse = job.q, job.k, job.v, job.call, job.bias, job.lse
    B, H, G, N, M = call.shape
    step = N if N <= PACKED else max(1, tile_size(q.device) // (B * H * M))
    outs = []
    for a in range(0, N, step):
        rows = torch.arange(a, min(a + step, N), device=q.device)
        n = len(rows)
        hidden = ~pattern.mask(call, rows).to(q.device)
        for part in job.without:
            hidden = hidden | part.mask(call, rows)

        def tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hidden: Tensor = hidden, n: int = n) -> Out:
            scores = _scores(q, k).view(B, H, n, M)
            if bias is not None:
                scores = scores + bias[:, :, None]
            scores = scores.masked_fill(hidden, NEG_INF)
            return softmax(scores.view(B, G, H // G * n, M), v, lse)

        out = run(tile, q[:, :, a : a + n].reshape(B, G, H // G * n, -1), k, v, bias)
        outs.append(_unpack(out, B, H, n))
    return _rows(outs)


def _per_head(job: Job, pattern: PerHead) -> Out:
    """Each set of heads on its own, put back in order."""
    share = job.call.shape.H // job.call.shape.G
    outs = []
    for heads, part in pattern.parts:
        kv = kv_heads(heads, share)
        k, v = (t if kv == tuple(range(t.shape[1])) else t[:, list(kv)] for t in (job.k, job.v))
        mine = replace(
            job,
            q=job.q[:, list(heads)],
            k=k,
            v=v,
            call=job.call.take(heads, kv),
            bias=None if job.bias is None else job.bias[:, list(heads)],
            without=tuple(p.heads(heads, job.call) for p in job.without),
        )
        outs.append(_attend(mine, part))
    order = torch.tensor([h for heads, _ in pattern.parts for h in heads], device=job.q.device).argsort()
    sums = [out.lse for out in outs if out.lse is not None] if job.lse else []
    o = torch.cat([out.o for out in outs], 1).index_select(1, order)
    return Out(o, torch.cat(sums, 1).index_select(1, order) if sums else None)


def _by_size(pattern: Window, call: Call) -> PerHead:
    """A Window with sizes per head as one Window of ints for each pair of sizes."""
    H = call.shape.H
    sizes = [
        (t.expand(H) if len(t) == 1 else t).tolist() if isinstance(t, Tensor) else [t] * H
        for t in (pattern.sink, pattern.recent)
    ]
    heads: dict[tuple[int, int], list[int]] = {}
    for h, pair in enumerate(zip(*sizes, strict=True)):
        heads.setdefault(pair, []).append(h)
    return PerHead(tuple((tuple(ids), Window(*pair)) for pair, ids in heads.items()))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T, contiguous. A few rows against many keys: the product from the keys' side reads them once, in order."""
    if q.shape[-2] > PACKED or q.is_cuda:
        return q @ k.transpose(-1, -2)
    return (k @ q.transpose(-1, -2)).transpose(-1, -2).contiguous()


def _unpack(out: Out, B: int, H: int, n: int) -> Out:
    """From query heads packed on their kv head, [B, G, H/G*n, .], to [B, H, n, .]."""
    return Out(out.o.reshape(B, H, n, -1), None if out.lse is None else out.lse.reshape(B, H, n))


def _rows(outs: list[Out]) -> Out:
    """Tiles of rows, one below the other."""
    if len(outs) == 1:
        return outs[0]
    sums = [out.lse for out in outs if out.lse is not None]
    return Out(torch.cat([out.o for out in outs], 2), torch.cat(sums, 2) if sums else None)
