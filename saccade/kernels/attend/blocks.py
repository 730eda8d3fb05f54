"""attend over Blocks: gather the key blocks of some query blocks, one batched matmul, softmax, one matmul.

A line is one query block of one head with its list of key blocks. Blocks that every row of the line sees whole need no
mask; only those at an edge (the diagonal, the end of the keys, empty entries) do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Blocks, Pattern, per_head
from saccade.kernels.attend.tile import NEG_INF, Job, run, softmax, tile_size, training, wide
from saccade.kernels.merge import Out


@dataclass(frozen=True)
class Lines:
    """The lines of a call: rows of the batch, heads, query blocks, in this order.

    Query heads that share a key head and its lists are one line, their rows one below the other.

    Shapes: q [lines, rows, D]; k, v [B*G*key blocks, block_k * D]; index [lines, K]; base, first [lines].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor
    base: Tensor  # where each line's key head begins in k and v
    first: Tensor  # position of each line's first row
    bq: int
    bk: int

    @property
    def edge(self) -> Tensor:
        """Entries [lines, K] that need a mask; causal calls only."""
        start = self.index * self.bk
        return (self.index < 0) | (start + self.bk > self.first[:, None] + 1)


def attend_blocks(job: Job, pattern: Blocks) -> Out:
    """A contiguous call over Blocks."""
    B, H, G, N, _ = job.call.shape
    shared = pattern.index.shape[1] in {1, G} and job.bias is None and not job.without
    heads = G if shared else H
    lines = _lines(job, pattern, heads)
    if _flash_serves(job):
        edge = lines.edge
        out = _masked(job, lines, _left(lines.index, edge & (lines.index >= 0)), lse=True)
        out = _whole(lines, _left(lines.index, ~edge), out)
    else:
        out = _masked(job, lines, lines.index, job.lse)

    def back(t: Tensor) -> Tensor:
        t = t.view(B, heads, -1, H // heads, pattern.block_q, t.shape[2])
        return t.transpose(2, 3).reshape(B, H, -1, t.shape[5])[:, :, :N]

    return Out(back(out.o), back(out.lse[..., None]).squeeze(-1) if job.lse and out.lse is not None else None)


def _lines(job: Job, pattern: Blocks, heads: int) -> Lines:
    B, H, G, N, M = job.call.shape
    bq, bk, D = pattern.block_q, pattern.block_k, job.q.shape[3]
    index = pattern.index if heads == G else per_head(pattern.index, job.call)
    index = index.long().expand(B, heads, -1, -1)
    nq, nk = index.shape[2], -(-M // bk)
    q = _pad(job.q, nq * bq).reshape(B, heads, H // heads, nq, bq, D).transpose(2, 3)
    k, v = (_pad(t, nk * bk).reshape(B * G * nk, bk * t.shape[3]) for t in (job.k, job.v))
    base = (torch.arange(B * heads, device=q.device) // (heads // G) * nk).repeat_interleave(nq)
    first = (torch.arange(nq, device=q.device) * bq + job.call.offset).repeat(B * heads)
    return Lines(q.reshape(B * heads * nq, -1, D), k, v, index.flatten(0, 2), base, first, bq, bk)


def _flash_serves(job: Job) -> bool:
    """float32 on a CPU: torch's own flash kernel beats two matmuls there; in bfloat16 it is the other way round."""
    plain = job.bias is None and not job.without and job.call.causal and not training(job.q, job.k, job.v)
    return plain and job.q.device.type == "cpu" and job.q.dtype == torch.float32 and job.k.shape[3] == job.v.shape[3]


def _whole(lines: Lines, index: Tensor, rest: Out) -> Out:
    """Add the blocks that need no mask to a result: lines with equally long lists go through the kernel together."""
    o, lse, D = rest.o, rest.lse, lines.q.shape[2]
    assert lse is not None
    used = (index >= 0).sum(1)
    order = used.sort(stable=True).indices
    cuts = torch.unique_consecutive(used[order], return_counts=True)
    where = lines.base[:, None] + index.clamp_min(0)
    at = 0
    for K, count in zip(*(t.tolist() for t in cuts), strict=True):
        step = max(1, tile_size(lines.q.device) // (lines.q.shape[1] * lines.bk * max(K, 1)))
        for a in range(at, at + count if K else at, step):
            mine = order[a : min(a + step, at + count)]
            blocks = where[mine, :K].flatten()
            keys, values = (t.index_select(0, blocks).view(len(mine), 1, K * lines.bk, D) for t in (lines.k, lines.v))
            out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                lines.q[mine][:, None], keys, values, scale=1.0
            )
            # merged while it is in cache: the share of the whole blocks is a sigmoid of the two sums
            sums, other = sums.view(len(mine), -1), lse[mine]
            o[mine] = torch.lerp(o[mine], out[:, 0], torch.sigmoid(sums - other)[..., None])
            lse[mine] = torch.logaddexp(sums, other)
        at += count
    return Out(o, lse)


def _masked(job: Job, lines: Lines, index: Tensor, lse: bool) -> Out:
    """Any blocks: two matmuls, with a mask on the entries at an edge."""
    M, rows, bk, Dv = job.call.shape.M, lines.q.shape[1], lines.bk, lines.v.shape[1] // lines.bk
    columns = torch.arange(index.shape[1], device=index.device)
    used = (index >= 0).int().mul(columns + 1).amax(1).tolist() if len(columns) else [0] * len(index)
    tiles = _tiles(used, rows * bk, tile_size(index.device))
    read = torch.tensor([K for a, b, K in tiles for _ in range(a, b)], device=index.device)
    start = index * bk
    edge = (index < 0) | (start + bk > M)
    if job.call.causal:
        edge = edge | (start + bk > lines.first[:, None] + 1)
    # a row that reads a whole block cannot be empty, and its softmax needs no second look
    careful = [job.bias is not None or bool(job.without) or no for no in edge.all(1).tolist()]
    edge_line, edge_column = (edge & (columns < read[:, None])).nonzero(as_tuple=True)
    cuts = torch.searchsorted(edge_line, torch.tensor([0] + [b for _, b, _ in tiles], device=index.device)).tolist()
    ways, way = _edges(start[edge_line, edge_column], lines.first[edge_line], lines, job.call)
    where = lines.base[:, None] + index.clamp_min(0)
    outs = []
    for (a, b, K), lo, hi in zip(tiles, cuts, cuts[1:], strict=False):
        if K == 0:
            empty = lines.q.new_zeros(b - a, rows, Dv), wide(lines.q.new_full((b - a, rows), NEG_INF))
            outs.append(Out(*empty))
            continue
        extra = _extra(job, index[a:b, :K], a, b, lines.bq, bk)
        at, mine, look = (edge_line[lo:hi] - a, edge_column[lo:hi]), where[a:b, :K].flatten(), any(careful[a:b])

        def tile(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            extra: Tensor | None,
            at: tuple[Tensor, Tensor] = at,
            way: Tensor = way[lo:hi],
            where: Tensor = mine,
            K: int = K,
            look: bool = look,
        ) -> Out:
            keys = k.index_select(0, where).view(len(q), K * bk, -1)
            scores = torch.bmm(q, keys.transpose(1, 2))
            if len(way):
                blocks = scores.view(len(q), rows, K, bk)
                blocks[at[0], :, at[1]] = blocks[at[0], :, at[1]].masked_fill_(ways[way], NEG_INF)
            if extra is not None:
                scores = scores + extra
            return softmax(scores, v.index_select(0, where).view(len(q), K * bk, Dv), lse, look)

        outs.append(run(tile, lines.q[a:b], lines.k, lines.v, extra))
    o = torch.cat([out.o for out in outs])
    sums = [out.lse for out in outs if out.lse is not None] if lse else []
    return Out(o, torch.cat(sums) if sums else None)


def _left(index: Tensor, keep: Tensor) -> Tensor:
    """Lists with only the entries to keep, in order, the rest -1 and as short as the longest."""
    order = (~keep).byte().sort(dim=1, stable=True).indices
    longest = int(keep.sum(1).max())
    return index.masked_fill(~keep, -1).gather(1, order)[:, :longest]


def _edges(start: Tensor, first: Tensor, lines: Lines, call: Call) -> tuple[Tensor, Tensor]:
    """What edge blocks hide: all the ways in which a block can lie [ways, rows, bk], and each one's way [edges].

    A causal edge is told by how far the key block starts behind the query block, any other by how many slots are real.
    """
    bq, bk, rows = lines.bq, lines.bk, torch.arange(lines.q.shape[1], device=start.device) % lines.bq
    slots = torch.arange(bk, device=start.device)
    if call.causal:
        apart = torch.arange(-bk, bq + 1, device=start.device)
        ways = slots + apart[:, None, None] > rows[:, None]
        return ways, torch.where(start < 0, bq, start - first).clamp(-bk, bq) + bk
    ways = (slots >= torch.arange(bk + 1, device=start.device)[:, None, None]).expand(-1, len(rows), -1)
    return ways, torch.where(start < 0, 0, call.shape.M - start).clamp(0, bk)


def _tiles(used: list[int], entries: int, most: int) -> list[tuple[int, int, int]]:
    """Cut lines into tiles (first, last, blocks read) of at most `most` scores, a multiple of the threads each."""
    tiles, a, threads = [], 0, torch.get_num_threads()
    while a < len(used):
        K, b = used[a], a + 1
        while b < len(used) and (b + 1 - a) * entries * max(K, used[b]) <= most:
            K, b = max(K, used[b]), b + 1
        if b < len(used) and b - a > threads:
            b -= (b - a) % threads
        tiles.append((a, b, max(used[a:b])))
        a = b
    return tiles


def _extra(job: Job, picked: Tensor, a: int, b: int, bq: int, bk: int) -> Tensor | None:
    """What is added to the scores of lines a to b of a block tile: key bias, and -inf for pairs counted elsewhere."""
    if job.bias is None and not job.without:
        return None
    B, H, _, _, M = job.call.shape
    slots = (picked.clamp_min(0)[..., None] * bk + torch.arange(bk, device=picked.device)).flatten(1).clamp(max=M - 1)
    count = -(-job.call.shape.N // bq)
    lines = torch.arange(a, b, device=picked.device)
    row, head = lines // (H * count), lines // count % H
    extra = slots.new_zeros((), dtype=torch.float32).expand(b - a, bq, slots.shape[1])
    if job.bias is not None:
        extra = job.bias[row, head].gather(1, slots)[:, None].expand(-1, bq, -1)
    if job.without:
        hidden = torch.stack([_hidden(i, slots[i - a], bq, job.call, job.without) for i in range(a, b)])
        extra = extra.masked_fill(hidden, NEG_INF)
    return extra


def _hidden(line: int, slots: Tensor, bq: int, call: Call, without: tuple[Pattern, ...]) -> Tensor:
    """Pairs of one block line [bq, S] that other patterns count."""
    B, H, _, N, _ = call.shape
    head, block = divmod(line, -(-N // bq))
    row, head = divmod(head, H)
    one = call.take((head,), (head * call.shape.G // H,))
    rows = (block * bq + torch.arange(bq, device=slots.device)).clamp(max=N - 1)
    found = torch.zeros((bq, len(slots)), dtype=torch.bool, device=slots.device)
    for part in without:
        mine = part.heads((head,), call).member(one, rows, slots[None, None, None]).expand(B, 1, bq, len(slots))
        found = found | mine[row, 0]
    return found


def _pad(t: Tensor, length: int) -> Tensor:
    """Zeros up to a length of the third axis."""
    return t if t.shape[2] == length else torch.nn.functional.pad(t, (0, 0, 0, length - t.shape[2]))
