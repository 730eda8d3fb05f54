"""From a pattern to plain index tensors that one kernel launch reads: no mixture, no union, no head axis left to guess.

Everything here is tensor arithmetic on the device: no host waits for a value, and nothing grows with N x M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.core.call import Call, kv_heads
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Blocks, Full, Pattern, PerHead, Tokens, Union, Window
from saccade.kernels.here import here

EVERYTHING = 1 << 30  # a window as wide as this is Full
SHORT, LONGEST = 256, 4096  # lists that a program sorts: two kernels, whatever the length
BIG = torch.iinfo(torch.int32).max  # sorts behind every block and slot


@dataclass(frozen=True)
class Lowered:
    """A layer's mixture of patterns: a pair is visited when its blocks, its window or its tokens hold it.

    Lists may be shared: all tensors have the same head axis L, one of 1, G or H; query head h reads list h // (H // L).

    Args:
        block_q: rows in a query block, counted from the call's first query; nq = ceil(N / block_q).
        block_k: slots in a key block.
        index: int32 [1|B, L, nq, K] key blocks of each query block, distinct and ascending, empties (-1) last; None
            where no head has blocks. Blocks of the future or beyond the store may be there, a kernel skips them.
        count: int32 [1|B, L, nq], how many of the K are real; None with index.
        sink, recent: int32 [L], positions j < sink or |p - j| < recent are seen; (0, 0) is no window, Full is
            (0, EVERYTHING). They may overlap the blocks and tokens.
        windows: False where no head has a window, so that a kernel need not look.
        tokens: int32 [1|B, L, 1|nq, T] single slots, distinct and ascending, empties (-1) last; slots that a block of
            the same query block holds are not among them. None where no head has tokens.
    """

    block_q: int
    block_k: int
    index: Tensor | None
    count: Tensor | None
    sink: Tensor
    recent: Tensor
    windows: bool
    tokens: Tensor | None

    @property
    def lists(self) -> int:
        """L, the size of the head axis."""
        return len(self.sink)


@dataclass(frozen=True)
class _Parts:
    """A pattern on its way: lists in no order, head axes of 1, G or H."""

    block_q: int = 0
    block_k: int = 0
    index: Tensor | None = None
    sink: int | Tensor = 0
    recent: int | Tensor = 0
    tokens: Tensor | None = None
    joined: bool = False  # lists of several patterns side by side: the same block or slot may be there twice

    @property
    def full(self) -> bool:
        return not isinstance(self.recent, Tensor) and self.recent >= EVERYTHING


def lower(pattern: Pattern, call: Call, device: torch.device | str, block: int = 128) -> Lowered:
    """The index tensors of a pattern.

    Args:
        pattern: any mixture of Full, Window, Blocks and Tokens.
        call: the call it is for.
        device: where the tensors go.
        block: block_q and block_k where the pattern has no blocks.

    Raises:
        UnsupportedError: a kind of pattern that has no lists.
    """
    parts = _parts(pattern, call, torch.device(device))
    if parts.tokens is not None and parts.tokens.shape[2] > 1:
        # each query has its own list: a block of queries is one query
        parts = _refined(parts, 1, parts.block_k, call.shape.N) if parts.index is not None else parts
        block = 1
    elif parts.index is not None:
        block = parts.block_q
    sizes = [t.shape[1] for t in (parts.index, parts.tokens) if t is not None]
    sizes += [len(t) for t in (parts.sink, parts.recent) if isinstance(t, Tensor)]
    lists = max(sizes, default=1)
    index, tokens = (None if t is None else _lift(t, lists, call) for t in (parts.index, parts.tokens))
    count = None
    if index is not None:
        index, count = _ascending(index, parts.joined)
    if tokens is not None:
        tokens, _ = _ascending(tokens, parts.joined)
        if index is not None and count is not None:
            tokens = _outside(tokens, index, count, parts.block_k)
    windows = isinstance(parts.recent, Tensor) or isinstance(parts.sink, Tensor) or parts.sink + parts.recent > 0
    if windows:
        sink, recent = (_column(t, lists, torch.device(device)) for t in (parts.sink, parts.recent))
    else:
        sink, recent = torch.zeros((2, lists), dtype=torch.int32, device=device)
    return Lowered(block, parts.block_k or 128, index, count, sink, recent, windows, tokens)


def unlisted(pattern: Pattern) -> str | None:
    """The name of a kind in the pattern that has no lists, or None."""
    if isinstance(pattern, Union | PerHead):
        parts = pattern.parts if isinstance(pattern, Union) else [part for _, part in pattern.parts]
        return next((name for part in parts if (name := unlisted(part)) is not None), None)
    return None if isinstance(pattern, Full | Window | Blocks | Tokens) else type(pattern).__name__


def _parts(pattern: Pattern, call: Call, device: torch.device) -> _Parts:
    if isinstance(pattern, Full):
        return _Parts(recent=EVERYTHING)
    if isinstance(pattern, Window):
        return _Parts(sink=_sized(pattern.sink, device), recent=_sized(pattern.recent, device))
    if isinstance(pattern, Blocks):
        index = pattern.index.to(device, torch.int32)
        return _Parts(pattern.block_q, pattern.block_k, index)
    if isinstance(pattern, Tokens):
        return _Parts(tokens=pattern.index.to(device, torch.int32))
    if isinstance(pattern, Union):
        parts = _parts(pattern.parts[0], call, device)
        for part in pattern.parts[1:]:
            parts = _join(parts, _parts(part, call, device), call)
        return parts
    if isinstance(pattern, PerHead):
        return _stack(pattern, call, device)
    raise UnsupportedError(f"attend: {unlisted(pattern)} has no lists of blocks, windows or tokens; use impl='tiled'")


def _sized(value: int | Tensor, device: torch.device) -> int | Tensor:
    if isinstance(value, Tensor):
        return value.to(device).clamp(max=EVERYTHING).to(torch.int32)
    return min(value, EVERYTHING)


def _join(a: _Parts, b: _Parts, call: Call) -> _Parts:
    """The union of two."""
    if a.full or b.full:
        return _Parts(recent=EVERYTHING)
    block_q, block_k = gcd(a.block_q, b.block_q), gcd(a.block_k, b.block_k)
    lists = [_refined(p, block_q, block_k, call.shape.N).index for p in (a, b)]
    tokens = [p.tokens for p in (a, b)]
    return _Parts(
        block_q,
        block_k,
        _beside(lists, call),
        _largest(a.sink, b.sink, call),
        _largest(a.recent, b.recent, call),
        _beside(tokens, call),
        a.joined or b.joined or any(all(t is not None for t in pair) for pair in (lists, tokens)),
    )


def _stack(pattern: PerHead, call: Call, device: torch.device) -> _Parts:
    """One list per query head, whatever its head has."""
    share, N = call.shape.H // call.shape.G, call.shape.N
    calls = [call.take(heads, kv_heads(heads, share)) for heads, _ in pattern.parts]
    found = [_parts(part, sub, device) for (_, part), sub in zip(pattern.parts, calls, strict=True)]
    block_q, block_k = (gcd(*(getattr(p, name) for p in found)) for name in ("block_q", "block_k"))
    found = [_refined(p, block_q, block_k, N) for p in found]
    order = [h for heads, _ in pattern.parts for h in heads]
    at = [order.index(h) for h in range(len(order))]

    def gather(values: Sequence[Tensor | None]) -> Tensor | None:
        real = [t for t in values if t is not None]
        if not real:
            return None
        size = [max(t.shape[axis] for t in real) for axis in (0, 2, 3)]
        rows: list[Tensor] = []
        for value, sub in zip(values, calls, strict=True):
            if value is None:
                value = torch.full((1, 1, 1, 1), -1, dtype=torch.int32, device=device)
            value = torch.nn.functional.pad(_lift(value, sub.shape.H, sub), (0, size[2] - value.shape[3]), value=-1)
            rows += value.expand(size[0], -1, size[1], -1).split(1, dim=1)
        return torch.cat([rows[i] for i in at], 1)

    def column(name: str) -> int | Tensor:
        values = [getattr(p, name) for p in found]
        if not any(isinstance(v, Tensor) for v in values) and len(set(values)) == 1:
            return int(values[0])
        cells: list[Tensor] = []
        for value, sub in zip(values, calls, strict=True):
            cells += _column(value, sub.shape.H, device).split(1)
        return torch.cat([cells[i] for i in at])

    lists, tokens = gather([p.index for p in found]), gather([p.tokens for p in found])
    return _Parts(block_q, block_k, lists, column("sink"), column("recent"), tokens, any(p.joined for p in found))


def _refined(parts: _Parts, block_q: int, block_k: int, N: int) -> _Parts:
    """The same pairs in smaller blocks."""
    index = parts.index
    if index is None or (parts.block_q, parts.block_k) == (block_q, block_k):
        return replace(parts, block_q=block_q, block_k=block_k)
    many = parts.block_k // block_k
    if many > 1:
        finer = index[..., None] * many + torch.arange(many, dtype=torch.int32, device=index.device)
        index = finer.masked_fill(index[..., None] < 0, -1).flatten(3)
    if parts.block_q > block_q:
        index = index.repeat_interleave(parts.block_q // block_q, dim=2)[:, :, : -(-N // block_q)]
    return replace(parts, block_q=block_q, block_k=block_k, index=index)


def _beside(lists: Sequence[Tensor | None], call: Call) -> Tensor | None:
    """Lists of the same rows in one."""
    real = [t for t in lists if t is not None]
    if len(real) < 2:
        return real[0] if real else None
    heads, size = max(t.shape[1] for t in real), [max(t.shape[axis] for t in real) for axis in (0, 2)]
    return torch.cat([_lift(t, heads, call).expand(size[0], -1, size[1], -1) for t in real], 3)


def _lift(t: Tensor, lists: int, call: Call) -> Tensor:
    """Axis 1 from 1 or G lists to more."""
    if t.shape[1] in {1, lists}:
        return t.expand(-1, lists, *t.shape[2:])
    return t.repeat_interleave(lists // t.shape[1], dim=1)


def _column(value: int | Tensor, lists: int, device: torch.device) -> Tensor:
    """int32 [lists] on the device; a fill, not a copy from the host."""
    if isinstance(value, Tensor):
        return value if len(value) == lists else value.repeat_interleave(lists // len(value))
    return torch.full((lists,), value, dtype=torch.int32, device=device)


def _largest(a: int | Tensor, b: int | Tensor, call: Call) -> int | Tensor:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        lists = max(len(a), len(b))
        return torch.maximum(*(_column(t, lists, t.device) for t in (a, b)))
    if isinstance(a, Tensor):
        return a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def _ascending(lists: Tensor, joined: bool) -> tuple[Tensor, Tensor]:
    """Lists in ascending order with their empties last, what is twice in a joined list there once; and their counts."""
    if lists.is_cuda and not joined and lists.shape[3] <= LONGEST:
        return arrange(lists)
    lists = lists.masked_fill(lists < 0, BIG).sort(-1).values
    if joined:
        twice = torch.nn.functional.pad(lists[..., 1:] == lists[..., :-1], (1, 0), value=False)
        lists = lists.masked_fill(twice, BIG).sort(-1).values
    real = lists != BIG
    return lists.masked_fill(~real, -1).contiguous(), real.sum(-1, dtype=torch.int32)


def _outside(tokens: Tensor, index: Tensor, count: Tensor, block_k: int) -> Tensor:
    """The tokens of each query block that none of its key blocks holds; all of them ascending, empties last."""
    B = max(tokens.shape[0], index.shape[0])
    if tokens.is_cuda:
        return outside(tokens, index, count, block_k, B)
    index = index.masked_fill(index < 0, BIG).expand(B, -1, -1, -1).contiguous()
    tokens = tokens.masked_fill(tokens < 0, BIG).expand(B, -1, index.shape[2], -1).contiguous()
    block = tokens // block_k
    at = torch.searchsorted(index, block).clamp_(max=index.shape[3] - 1)
    tokens = tokens.masked_fill(index.gather(3, at) == block, BIG).sort(-1).values
    return tokens.masked_fill(tokens == BIG, -1)


@here
def arrange(lists: Tensor) -> tuple[Tensor, Tensor]:
    """Lists [B,L,n,K] of distinct numbers, ascending with empties (-1) last, and how many are real: one launch."""
    B, L, n, K = lists.shape
    out = torch.empty((B, L, n, K), dtype=torch.int32, device=lists.device)
    count = torch.empty((B, L, n), dtype=torch.int32, device=lists.device)
    kernel: Any = _arrange
    kernel[(B * L * n,)](lists, out, count, *lists.stride(), L, n, K, SIZE=SHORT if K <= SHORT else LONGEST)
    return out, count


@here
def outside(tokens: Tensor, index: Tensor, count: Tensor, block_k: int, B: int) -> Tensor:
    """As `_outside`, on the device: one launch, a search in the list of blocks for each token."""
    L, n, T = index.shape[1], index.shape[2], tokens.shape[3]
    out = torch.full((B, L, n, T), -1, dtype=torch.int32, device=tokens.device)
    steps = [s if size > 1 else 0 for s, size in zip(tokens.stride(), tokens.shape, strict=True)]
    batch = index.stride(0) if index.shape[0] > 1 else 0
    kernel: Any = _drop_held
    kernel[(B * L * n,)](
        tokens,
        index,
        count,
        out,
        *steps[:3],
        batch,
        batch // index.shape[3],
        L,
        n,
        T,
        index.shape[3],
        block_k,
        index.shape[3].bit_length(),
        CHUNK=1024,
    )
    return out


@triton.jit(do_not_specialize=["sb", "sl", "sn", "sk", "L", "n", "K"])
def _arrange(lists, out, count, sb, sl, sn, sk, L, n, K, SIZE: tl.constexpr):
    """One list: copied if it is in order, as selections leave it, else sorted."""
    line = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    row = lists + line // n // L * sb + line // n % L * sl + line % n * sn
    x = tl.load(row + at * sk, mask=at < K, other=-1)
    y = tl.load(row + (at + 1) * sk, mask=at + 1 < K, other=-1)
    x = tl.where(x < 0, 2147483647, x)
    y = tl.where(y < 0, 2147483647, y)
    if tl.max((x > y).to(tl.int32), 0) > 0:
        x = tl.sort(x)
    real = x != 2147483647
    tl.store(out + line * K + at, tl.where(real, x, -1), mask=at < K)
    tl.store(count + line, tl.sum(real.to(tl.int32), 0))


@triton.jit(do_not_specialize=["sb", "sl", "sn", "ib", "cb", "L", "n", "T", "K", "block_k", "halvings"])
def _drop_held(tokens, index, count, out, sb, sl, sn, ib, cb, L, n, T, K, block_k, halvings, CHUNK: tl.constexpr):
    """The tokens of one line that no block of its list holds, in order."""
    line = tl.program_id(0).to(tl.int64)
    b = line // n // L
    inner = line % (n * L)
    tokens += b * sb + line // n % L * sl + line % n * sn
    index += b * ib + inner * K
    many = tl.load(count + b * cb + inner)
    out += line * T
    written = 0
    for i in range(0, T, CHUNK):
        at = i + tl.arange(0, CHUNK)
        t = tl.load(tokens + at, mask=at < T, other=-1)
        block = t // block_k
        # the first of the list's blocks that is not before the token's
        low = tl.zeros([CHUNK], tl.int32)
        high = tl.zeros([CHUNK], tl.int32) + many
        for _ in range(halvings):
            middle = (low + high) // 2
            before = (low < high) & (tl.load(index + middle, mask=low < high, other=0) < block)
            high = tl.where(before, high, tl.where(low < high, middle, high))
            low = tl.where(before, middle + 1, low)
        found = tl.load(index + low, mask=low < many, other=-1)
        keep = (t >= 0) & (found != block)
        place = tl.cumsum(keep.to(tl.int32), 0) - 1 + written
        tl.store(out + place, t, mask=keep)
        written += tl.sum(keep.to(tl.int32), 0)
