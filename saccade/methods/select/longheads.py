"""LongHeads: every head reads a few chunks of its own choice, moved so close together that no distance is new to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Blocks
from saccade.core.rope import Rope
from saccade.kernels.attend import attend
from saccade.kernels.merge import Out
from saccade.kernels.moved import attend_moved
from saccade.kernels.scores import products
from saccade.kernels.topk import top_blocks
from saccade.methods.base import Attention

TILE = 1 << 24  # scores held at a time
SPARE = 16  # queries kept beyond an unfinished chunk, so that a draft may be taken back


@dataclass(frozen=True)
class LongHeads(Attention):
    """Chunks that each head chooses, at positions within the trained length (Lu et al. 2024, arXiv 2402.10685).

    Official code: LuLuLuyi/LongHeads. The context is cut into chunks. A chunk is summed up by one key: what its own
    mean attention output looks at among its keys. A query compares itself, unrotated, with these keys and reads the
    best chunks beside the first one, the one before its own, and its own; they are renumbered to follow one another. A
    model reads texts many times longer than it was trained for, without training.

    Args:
        keys: tokens that a query reads at most, within the trained length; a multiple of `chunk`, at least four.
        chunk: tokens of a chunk.
        begin: positions before this one are attended densely, at their own positions; None = `keys`.
        block_q: rows that choose together in prefill; while decoding each token chooses for itself.

    Shapes:
        q [B,H,N,D], k [B,G,M,D], v [B,G,M,Dv] -> Out(o [B,H,N,Dv], lse [B,H,N])

    Departs from the paper: in prefill the rows of a query block choose together, by the largest share that any of them
        gives a chunk (each row's softmax over what there is to choose), where the paper's choose alone; a token reads
        itself in prefill too, as while decoding; where values and keys differ in width, a chunk's mean query stands in
        for its mean output.

    Raises:
        UnsupportedError: a model whose rotary positions are not known, or a store with holes.
        InputError: a context whose earlier tokens this method has not seen: it belongs into prefill and decode.

    Example:
        >>> q, k = torch.randn(1, 4, 600, 8), torch.randn(1, 2, 600, 8)
        >>> call = Call.of(q, k, rope=Rope(torch.rand(4)))
        >>> LongHeads(keys=128, chunk=32).attend(q, k, k, call).o.shape
        torch.Size([1, 4, 600, 8])
    """

    phases = ("prefill", "decode")
    strictly_causal = False  # the rows of a query block choose together
    exact = False
    chunked = "query blocks start where a chunk of the prompt starts"
    unbroken = True
    both = True
    paper = "LongHeads, Findings of EMNLP 2024, arXiv 2402.10685"

    keys: int = 4096
    chunk: int = 256
    begin: int | None = None
    block_q: int = 64

    def __post_init__(self) -> None:
        for name, least in (("keys", 1), ("chunk", 1), ("begin", 0), ("block_q", 1)):
            value = getattr(self, name)
            if name == "begin" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"LongHeads: {name} must be an int >= {least}, got {value!r}")
        if self.keys % self.chunk or self.keys < 4 * self.chunk:
            raise InputError(
                f"LongHeads: keys={self.keys} must be a multiple of chunk={self.chunk}, at least four chunks"
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Out:
        call.check(q, k, v, name="LongHeads")
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "LongHeads: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        if call.rope is None:
            raise UnsupportedError(
                "LongHeads: moves keys to other positions, but how this model rotates them is not known"
            )
        N = call.shape.N
        summed = self._chunk_keys(q, k, v, call, call.rope)
        begin = self.keys if self.begin is None else self.begin
        near = min(N, max(0, begin - call.offset))
        outs = []
        if near:
            part = replace(call, shape=call.shape._replace(N=near, M=call.offset + near))
            outs.append(attend(q[:, :, :near], k[:, :, : part.shape.M], v[:, :, : part.shape.M], None, part))
        if near < N:
            part = replace(call, shape=call.shape._replace(N=N - near))
            outs.append(attend_moved(q[:, :, near:], k, v, self._choose(q[:, :, near:], summed, part), part))
        if len(outs) == 1:
            return outs[0]
        return Out(
            torch.cat([out.o for out in outs], 2), torch.cat([out.lse for out in outs if out.lse is not None], 2)
        )

    def ready(self, call: Call) -> bool:
        mine: dict[str, Any] = call.memory.get(f"longheads {call.heads}", {"slots": 0})
        kept = min(mine["slots"], call.offset) // self.chunk * self.chunk
        # "slots" is cut when tokens are taken back, so the tail says by itself where it starts
        held = "tail" in mine and mine["slots"] >= call.offset and mine["start"] <= kept
        return call.offset == kept or held

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        begin = min(M, self.keys if self.begin is None else self.begin)
        near = min(N, max(0, begin - call.offset))
        dense = near * call.offset + near * (near + 1) / 2
        far = (N - near) * (min(self.keys, M) + M // self.chunk)
        return float(B * H * (dense + far + N * 2 * self.chunk))

    def _choose(self, q: Tensor, summed: Tensor, call: Call) -> Blocks:
        """The chunks of each query block."""
        (B, H, _, N, M), size = call.shape, self.chunk
        rows = 1 if call.offset > 0 and N <= 16 else self.block_q
        count, chunks = -(-N // rows), -(-M // size)
        assert call.rope is not None
        free = call.rope.free(q, torch.arange(call.offset, M, device=q.device))
        first = torch.arange(count, device=q.device) * rows + call.offset
        last = (first + rows - 1).clamp(max=M - 1)
        chunk = torch.arange(chunks, device=q.device)
        before = (first // size)[:, None]
        # the first chunk, the one before and their own are read by all rows
        forced = (chunk == 0) | ((chunk >= before - 1) & (chunk <= (last // size)[:, None]))
        # of those in between each row has one vote to share out: a row that asks is not drowned by many that do not
        barred = forced | (chunk >= before)
        step = max(1, TILE // (B * H * rows * chunks))
        votes = []
        for a in range(0, count, step):
            asked = free[:, :, a * rows : (a + step) * rows]
            scores = products(asked, summed) * call.softmax_scale(q.shape[3])
            lost = -asked.shape[2] % rows
            scores = pad(scores, (0, chunks - scores.shape[3], 0, lost)).unflatten(2, (-1, rows))
            scores = scores.masked_fill(barred[a : a + step, None], torch.finfo(scores.dtype).min)
            shares = torch.log_softmax(scores, -1)
            if lost:
                shares[:, :, -1, rows - lost :] = float("-inf")
            votes.append(shares.amax(3))
        scores = torch.cat(votes, 2).masked_fill(barred, float("-inf")).masked_fill(forced, float("inf"))
        own = 1 if rows == 1 else -(-(rows - 1) // size) + 1
        return top_blocks(scores, self.keys // size + own - 1, rows, size, call)

    def _chunk_keys(self, q: Tensor, k: Tensor, v: Tensor, call: Call, rope: Rope) -> Tensor:
        """One key for each whole chunk so far, kept in memory: [B,H,chunks,D]."""
        size, M = self.chunk, call.shape.M
        mine: dict[str, Any] = call.memory.setdefault(f"longheads {call.heads}", {"slots": 0})
        kept, whole = min(mine["slots"], call.offset) // size, M // size
        asked = q.detach()
        if call.offset > kept * size:
            # the queries of the chunk that was not finished; tokens that were taken back lie behind those
            if not self.ready(call):
                raise InputError(
                    f"LongHeads: {call.offset} tokens are stored whose queries it has not seen or no longer has (layer "
                    f"{call.layer}); put it into prefill and decode of the same heads, and take tokens of a prompt "
                    f"back in whole chunks of {size}"
                )
            tail, start = mine["tail"], mine["start"]
            asked = torch.cat((tail[:, :, kept * size - start : call.offset - start], asked), 2)
        rows: Tensor = mine.get("rows", q.new_zeros((*q.shape[:2], 0, q.shape[3])))[:, :, :kept]
        if whole > kept:
            part = slice(kept * size, whole * size)
            new = chunk_keys(
                asked[:, :, : part.stop - part.start], k[:, :, part], v[:, :, part], part.start, size, rope, call
            )
            rows = torch.cat((rows, new), 2)
        # enough for the chunk at hand, and for one more before it if tokens are taken back; a copy, because a slice
        # would hold all queries of the prompt in memory
        left = min(asked.shape[2], M - max(0, (M - SPARE) // size) * size)
        mine.update(slots=M, rows=rows, tail=asked[:, :, asked.shape[2] - left :].clone(), start=M - left)
        return rows


def chunk_keys(q: Tensor, k: Tensor, v: Tensor, first: int, size: int, rope: Rope, call: Call) -> Tensor:
    """The key that sums up each chunk: q [B,H,n*size,D], k [B,G,n*size,D], v [B,G,n*size,Dv] -> [B,H,n,D].

    `first` is the slot of the first token.

    Inside a chunk only distances count, so the rotation that q and k come with serves; the sum itself is made of keys
    that are rotated to positions 0, 1, ... of their chunk.
    """
    share, scale = q.shape[1] // k.shape[1], call.softmax_scale(q.shape[3])
    q, k, v = (t.detach().unflatten(2, (-1, size)) for t in (q, k, v))
    start = torch.arange(q.shape[2], device=q.device) * size + first
    local = rope.free(k.flatten(2, 3), start.repeat_interleave(size)).unflatten(2, (-1, size))
    k, v, local = (t.repeat_interleave(share, 1) for t in (k, v, local))
    if v.shape[4] == q.shape[4]:
        weights = torch.softmax((q @ k.transpose(-1, -2)) * scale, -1)
        mean = (weights @ v).mean(3, keepdim=True)
    else:
        mean = q.mean(3, keepdim=True)
    return (torch.softmax((mean @ local.transpose(-1, -2)) * scale, -1) @ local).squeeze(3)
