"""Tier: keys and values by block in host memory or a mapped file, read through a block cache of fixed size."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saccade.cache.arena import Arena
from saccade.cache.cap import Cap
from saccade.cache.near import Counters, Near
from saccade.core.errors import DamagedError, InputError, SpaceError
from saccade.kernels import transfer

ALL = slice(None)
READ = 1 << 22  # bytes that the host reads at a time


class Placed(NamedTuple):
    """Blocks that are on the device now: views of all places of the cache, and where in it the blocks stand.

    They stand there until the tier is asked for others.

    Shapes: k [1,1,places*block,D], v [1,1,places*block,Dv], at int32 [B,G,n], ascending, -1 = none
    """

    k: Tensor
    v: Tensor
    at: Tensor


class Coming(NamedTuple):
    """Blocks that are asked for [B,G,n]: their numbers, their checksums, and the places that they come to."""

    slots: Any
    sums: Any
    at: Any


class Piece(NamedTuple):
    """Blocks of some rows and heads that are read together, side by side on the device, until the next piece comes.

    Shapes: k [b,g,n*block,D], v [b,g,n*block,Dv]
    """

    rows: slice
    heads: slice
    blocks: slice
    k: Tensor
    v: Tensor


class Tier:
    """Keys and values of some key heads, a block at a time, far from the device and read through a cache on it.

    Blocks are written once and then only read, so that rows of a batch (beams) share them: `select` copies numbers,
    not blocks. Each block's checksum is kept apart from it and compared whenever it is read, single tokens' too: a
    block of another layer, or one that was written over, raises DamagedError. On a CPU a thread copies, on a GPU a
    stream of its own. What is read is attended where it lies in the cache, without a copy (`place`, `sweep`); `fetch`
    gives copies.

    Args:
        block: tokens in a block.
        budget: bytes of the block cache on the device; it never holds more.
        folder: a folder for mapped files; None = host memory, pinned where the keys are on a GPU.
        limit: bytes that the far side may use; None = what there is.
        name: said in errors: which layer, which heads.
        cap: shared with other tiers, which together stay within the smallest budget of any; None = a cap of its own.

    Shapes:
        append: k [B,G,n*block,D], v [B,G,n*block,Dv]; fetch: index [B,G,n] -> k [B,G,n*block,D], v [B,G,n*block,Dv]

    Raises:
        InputError: a budget smaller than one block (and its checksum of 8 bytes), a folder that is none.

    Example:
        >>> tier = Tier(block=2, budget=1 << 12)
        >>> tier.append(torch.arange(8.0).view(1, 1, 4, 2), torch.arange(4.0).view(1, 1, 4, 1))
        >>> k, v = tier.fetch(torch.tensor([[[1]]]))
        >>> k.flatten().tolist(), v.flatten().tolist(), tier.counters.misses
        ([4.0, 5.0, 6.0, 7.0], [2.0, 3.0], 1)
    """

    def __init__(
        self,
        block: int,
        budget: int,
        folder: str | None = None,
        limit: int | None = None,
        name: str = "tier",
        cap: Cap | None = None,
    ) -> None:
        if block < 1 or budget < 1:
            raise InputError(f"{name}: block and budget must be >= 1, got {block} tokens and {budget} bytes")
        if folder is not None and not os.path.isdir(folder):
            raise InputError(f"{name}: {folder!r} is no folder; make it, or give another")
        self.block, self.budget, self.folder, self.limit, self.name = block, budget, folder, limit, name
        self.cap = Cap() if cap is None else cap
        self.split = 0  # width of keys; what follows in a row is the value
        self.arena: Arena | None = None
        self.near: Near | None = None
        self.table = torch.zeros(0, 0, 0, dtype=torch.long)  # [B,G,blocks] numbers of the blocks
        self.sums = torch.zeros(0, 0, 0, dtype=torch.long)  # their checksums
        self._wrong: Tensor | None = None  # on a GPU: was any block damaged?
        self._told: tuple[Tensor, Any] | None = None  # the same on its way to the host, and when it is there
        self._asked = False  # is it on its way?
        self._held: list[Tensor] = []
        self._finalizer: Any = None

    @property
    def blocks(self) -> int:
        """Blocks of each key head."""
        return self.table.shape[2]

    @property
    def tokens(self) -> int:
        """Tokens of each key head."""
        return self.blocks * self.block

    @property
    def counters(self) -> Counters:
        """Shared by all rows that came from one tier by `select`."""
        return Counters() if self.near is None else self.near.counters

    @property
    def places(self) -> int:
        """Blocks that can be asked for at once."""
        return 0 if self.near is None else self.near.places

    def reserve(self, k: Tensor, v: Tensor, tokens: int) -> None:
        """Make room for so many tokens more of keys and values like these, before any are put away.

        Raises:
            InputError: see `append`.
            SpaceError, FileError: no space; nothing was changed.
        """
        if self.arena is None:
            self._open(k, v)
        assert self.arena is not None
        self.arena.reserve(k.shape[0] * k.shape[1] * -(-tokens // self.block))

    def append(self, k: Tensor, v: Tensor) -> None:
        """Put whole blocks behind those that are there. On an error nothing was changed.

        Raises:
            InputError: no whole blocks, or other sizes than before.
            SpaceError, FileError: no space for them.
        """
        B, G, n, D = k.shape
        if n % self.block or v.shape[:3] != k.shape[:3] or v.dtype != k.dtype:
            raise InputError(
                f"{self.name}: whole blocks of {self.block} tokens of one dtype are put away, got k {list(k.shape)} "
                f"{k.dtype} and v {list(v.shape)} {v.dtype}"
            )
        if self.arena is None:
            self._open(k, v)
        arena, near = self.arena, self.near
        assert arena is not None and near is not None
        if self.table.shape[:2] != (B, G) or self.split != D or D + v.shape[3] != arena.width or k.dtype != arena.dtype:
            raise InputError(
                f"{self.name}: holds {list(self.table.shape[:2])} rows and heads of width {self.split} and "
                f"{arena.width - self.split}, {arena.dtype}; got k {list(k.shape)} and v {list(v.shape)}, {k.dtype}"
            )
        rows = torch.cat((k, v), -1).detach().unflatten(2, (-1, self.block)).flatten(0, 2)
        sums = transfer.sums(rows).cpu()
        marks = transfer.marks(rows.flatten(0, 1)).view(-1, self.block).cpu()
        slots = arena.take(len(rows))
        try:
            arena.write(slots, rows, sums, marks)
        except BaseException:
            arena.release(slots)
            raise
        # the cache may hold what stood under these numbers before
        near.forget(slots.numpy())
        self._set(*(torch.cat((a, b.view(B, G, -1)), 2) for a, b in ((self.table, slots), (self.sums, sums))))

    def prefetch(self, index: Tensor, rows: slice = ALL, heads: Sequence[int] | None = None) -> Coming | None:
        """Start moving blocks index [B,G,n] (-1: none) to the device; what reads them waits for them.

        Returns:
            What `place` takes in place of the index, so that nothing is looked up twice; None where nothing is here.
        """
        if self.near is None or not self.blocks:
            return None
        slots, sums = self._numbers(index, rows, heads)
        self.near.want(_each_once(slots, len(self.near.arena.owners)))
        return Coming(slots, sums, np.where(slots >= 0, self.near.place[slots.clip(0)], -1))

    def place(
        self, index: Tensor | Coming, rows: slice = ALL, heads: Sequence[int] | None = None, ordered: bool = True
    ) -> Placed:
        """Blocks index [B,G,n] where they stand on the device, without a copy.

        Args:
            index: blocks of each row and head, -1 = none; or what `prefetch` gave, if nothing was asked for since.
            rows, heads: the rows and key heads (places in this tier, one may come twice) that `index` is for.
            ordered: places ascend; else they stand as in `index`.

        Raises:
            InputError: a block that is not there, or more blocks than the cache holds.
            DamagedError: a block is not what was put away.
        """
        near = self._near()
        self.check(wait=False)
        coming = index if isinstance(index, Coming) else self.prefetch(index, rows, heads)
        if coming is None:
            raise InputError(f"{self.name}: no blocks are here")
        near.settle()
        slots, sums, at = coming
        found = np.sort(at, -1) if ordered else at
        real = at >= 0
        if real.all():
            # one transfer for all three
            up = _up(np.stack((found, at, sums)), near.device)
            self._compare(up[1].flatten(), up[2].flatten())
            where = up[0]
        else:
            where = _up(found, near.device)
            self._compare(_up(at[real], near.device), _up(sums[real], near.device))
        k, v = self._halves(near.data.view(1, 1, -1, near.data.shape[2]))
        return Placed(k, v, where.int())

    def fetch(self, index: Tensor, rows: slice = ALL, heads: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Copies of keys and values of blocks index [B,G,n] on the device; -1 gives zeros. Else as `place`."""
        near = self._near()
        at = self.place(index, rows, heads, ordered=False).at
        got = near.data[at.clamp_min(0).long()]
        got = got.masked_fill((at < 0)[..., None, None], 0).flatten(2, 3)
        return self._halves(got)

    def sweep(self, index: Tensor, rows: slice = ALL, heads: Sequence[int] | None = None) -> Iterator[Piece]:
        """Blocks index [B,G,n] (none missing) once through: half of the cache (of host memory, a part) is read while as
        much arrives.

        For more than the cache holds, or what is read once only: nothing is looked up in the cache, and what comes is
        not found there later.
        """
        near = self._near()
        slots, sums = self._numbers(index, rows, heads)
        if not slots.size or (slots < 0).any():
            raise InputError(f"{self.name}: a sweep needs at least one block for each head, and none of them missing")
        near.fit()
        halves = 2 if len(near.data) > 1 else 1
        most = near.half()
        parts = _pieces(slots.shape, most)

        def start(number: int) -> Tensor:
            return near.line_up(slots[parts[number]].ravel(), number % halves * most)

        coming = start(0)
        for number, part in enumerate(parts):
            self.check(wait=False)
            near.settle()
            here = coming
            if halves == 2 and number + 1 < len(parts):
                coming = start(number + 1)
            first = number % halves * most
            b, g, n = slots[part].shape
            there = torch.arange(first, first + b * g * n, device=near.device)
            self._compare(there, _up(sums[part].ravel(), near.device))
            yield Piece(*part, *self._halves(here.view(b, g, n * self.block, -1)))
            if halves == 1 and number + 1 < len(parts):
                coming = start(number + 1)

    def rows(
        self, index: Tensor, heads: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of single tokens index [B,G,n] straight from the far side; -1 reads token 0.

        Args:
            index: tokens of each row and head.
            heads: the key heads (places in this tier, one may come twice) that `index` is for.
            device: where they go.

        Raises:
            InputError: a token that is not there.
            DamagedError: a token is not what was put away.
        """
        if self.arena is None:
            raise InputError(f"{self.name}: nothing was put away yet")
        index = index.cpu().long().clamp_min(0)
        if index.numel() and int(index.max()) >= self.tokens:
            raise InputError(f"{self.name}: token {int(index.max())} was asked for, {self.tokens} are here")
        table, sums = (t if heads is None else t[:, list(heads)] for t in (self.table, self.sums))
        slots, want = (t.gather(2, index // self.block).flatten() for t in (table, sums))
        rows, good = self.arena.rows(slots, (index % self.block).flatten())
        # that a row is what was written last into its block, and that this is the block that was put away
        wrong = ~good | (self.arena.stamps[slots] != want)
        if bool(wrong.any()):
            self._damaged(f"{int(wrong.sum())} of {len(wrong)} tokens")
        self.counters.single += rows.numel() * rows.element_size()
        return self._halves(rows.to(device, non_blocking=True).view(*index.shape, -1))

    def keys(self, first: int = 0, last: int | None = None, heads: Sequence[int] | None = None) -> Tensor:
        """Keys of tokens `first` to `last` in host memory [B,G,last-first,D]: what an index is built from.

        Raises:
            DamagedError: a block is not what was put away.
        """
        if self.arena is None:
            raise InputError(f"{self.name}: nothing was put away yet")
        last = self.tokens if last is None else last
        a, b = first // self.block, -(-last // self.block)
        index = torch.arange(a, b).expand(len(self.table), self.table.shape[1] if heads is None else len(heads), -1)
        slots, sums = self._numbers(index, ALL, heads)
        B, G, n = slots.shape
        arena = self.arena
        out = torch.empty(B, G, n, self.block, self.split, dtype=arena.dtype)
        step = max(1, min(n, READ // arena.block_bytes))
        # one room for all that is read: the system takes its time over memory that is new
        room = torch.empty(step, self.block, arena.width, dtype=arena.dtype)
        for row in range(B):
            for g in range(G):
                for c in range(0, n, step):
                    some = slots[row, g, c : c + step]
                    got = arena.read(some, room[: len(some)])
                    wrong = transfer.sums(got) != torch.from_numpy(sums[row, g, c : c + step])
                    if bool(wrong.any()):
                        self._damaged(f"{int(wrong.sum())} of {len(wrong)} blocks")
                    out[row, g, c : c + len(some)] = got[..., : self.split]
        out = out.flatten(2, 3)
        return out[:, :, first - a * self.block : last - a * self.block]

    def crop(self, blocks: int) -> None:
        """Keep the first `blocks` blocks of each head."""
        if not 0 <= blocks <= self.blocks:
            raise InputError(f"{self.name}: cannot keep {blocks} blocks of {self.blocks}")
        gone = self.table[:, :, blocks:]
        if self.arena is not None:
            self._set(self.table[:, :, :blocks], self.sums[:, :, :blocks])
            self._given_back(gone)

    def select(self, index: Tensor) -> Tier:
        """Rows index [B'] as a tier of their own; blocks and cache are shared."""
        other = Tier(self.block, self.budget, self.folder, self.limit, self.name, self.cap)
        other.split, other.arena, other.near = self.split, self.arena, self.near
        if self.arena is not None:
            index = index.cpu()
            table = self.table.index_select(0, index)
            self.arena.hold(table)
            other._set(table, self.sums.index_select(0, index))
        return other

    def check(self, wait: bool = True) -> None:
        """Raise DamagedError if a block that was read was damaged.

        Args:
            wait: on a GPU, for the answer; without it only what is known already is told, the rest later.
        """
        if self._wrong is None:
            return
        if wait:
            wrong = bool(self._wrong)
        elif not self._asked:
            if self._told is None:
                self._told = torch.zeros((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
            told, event = self._told
            told.copy_(self._wrong, non_blocking=True)
            event.record(torch.cuda.current_stream(self._wrong.device))
            self._asked = True
            return
        else:
            assert self._told is not None
            told, event = self._told
            if not event.query():
                return
            wrong = bool(told)
        self._asked = False
        if wrong:
            self._wrong = None
            self._damaged("blocks")

    def bytes(self) -> int:
        """Bytes on both sides, files included."""
        return self.far_bytes() + self.near_bytes()

    def far_bytes(self) -> int:
        """Bytes in host memory or files, room included; shared by rows that came by `select`."""
        return 0 if self.arena is None else self.arena.bytes()

    def near_bytes(self) -> int:
        """Bytes on the device."""
        return 0 if self.near is None else self.near.bytes()

    def close(self) -> None:
        """Give everything back; the tier is empty afterwards. Rows that came by `select` keep what they share."""
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None
        if self.near is not None:
            self.near.settle()
        self._held = []
        self.arena, self.near = None, None
        self.table = self.sums = torch.zeros(0, 0, 0, dtype=torch.long)

    def _open(self, k: Tensor, v: Tensor) -> None:
        width, (B, G) = k.shape[3] + v.shape[3], k.shape[:2]
        arena = Arena(self.block, width, k.dtype, self.folder, k.is_cuda, self.limit)
        if arena.limit is not None and arena.limit < B * G * arena.block_bytes:
            raise SpaceError(
                f"{self.name}: {arena.limit} bytes do not hold one block of {arena.block_bytes} bytes for each of "
                f"{B * G} heads"
            )
        near = Near(arena, k.device, self.cap, self.budget, self.name)
        self.split, self.arena, self.near = k.shape[3], arena, near
        empty = torch.zeros(B, G, 0, dtype=torch.long)
        self._set(empty, empty)

    def _near(self) -> Near:
        if self.near is None:
            raise InputError(f"{self.name}: nothing was put away yet")
        return self.near

    def _halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[..., : self.split], rows[..., self.split :]

    def _compare(self, places: Tensor, sums: Tensor) -> None:
        """Is what stands in these places what was put away? On a GPU nothing waits for the answer: see `check`."""
        near = self._near()
        wrong = near.sums[places] != sums
        if wrong.is_cuda:
            self._wrong = wrong.any() if self._wrong is None else self._wrong | wrong.any()
        elif bool(wrong.any()):
            near.forget(near.holds[places[wrong].unique().numpy()])
            self._damaged(f"{int(wrong.sum())} of {len(wrong)} blocks")

    def _set(self, table: Tensor, sums: Tensor) -> None:
        """The blocks that this tier owns from now on; they are given back when it is collected."""
        assert self.arena is not None
        self.table, self.sums = table, sums
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _let_go, self.arena, self._held)
            # at the end of the process the files are gone anyway
            self._finalizer.atexit = False
        self._held[:] = [table]

    def _numbers(self, index: Tensor, rows: slice, heads: Sequence[int] | None) -> tuple[Any, Any]:
        """The numbers in the arena of blocks `index`, -1 where there is none, and their checksums, as arrays."""
        at = index.cpu().long().numpy()
        if at.size and (at.max() >= self.blocks or at.min() < -1):
            raise InputError(f"{self.name}: blocks {at.min()} to {at.max()} were asked for, {self.blocks} are here")
        row = np.arange(len(self.table))[rows][:, None, None]
        head = np.arange(self.table.shape[1])[:, None] if heads is None else np.asarray(heads)[:, None]
        # a table is long, and what is looked up in it is little
        slots, sums = (t.numpy()[row, head, at.clip(0)] for t in (self.table, self.sums))
        if at.size and at.min() < 0:
            slots[at < 0], sums[at < 0] = -1, 0
        return slots, sums

    def _given_back(self, slots: Tensor) -> None:
        assert self.arena is not None and self.near is not None
        self.arena.release(slots)
        self.near.forget(slots.flatten().unique().numpy())

    def _damaged(self, what: str) -> None:
        raise DamagedError(
            f"{self.name}: {what} read from the far tier are not what was put away (another layer's, or written over)"
        )


def _pieces(shape: tuple[int, int, int], most: int) -> list[tuple[slice, slice, slice]]:
    """Rows, heads and blocks that are read together, at most so many blocks at a time."""
    B, G, K = shape
    b = min(B, most)
    g = min(G, most // b)
    n = min(K, most // (b * g))
    return [
        (slice(r, min(r + b, B)), slice(h, min(h + g, G)), slice(a, min(a + n, K)))
        for r in range(0, B, b)
        for h in range(0, G, g)
        for a in range(0, K, n)
    ]


def _each_once(slots: Any, blocks: int) -> Any:
    """The numbers in `slots` that are no -1, each once, ascending: marks cost less than sorting."""
    asked = np.zeros(blocks + 1, dtype=np.bool_)
    # -1 is the last
    asked[slots] = True
    return np.flatnonzero(asked[:-1])


def _up(numbers: Any, device: torch.device) -> Tensor:
    """An array on the device, without waiting for it."""
    here = torch.from_numpy(numbers)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


def _let_go(arena: Arena, held: list[Tensor]) -> None:
    for table in held:
        arena.release(table)
