"""Tier: keys and values by block in host memory or a mapped file, read through a block cache of fixed size."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.cache.arena import Arena
from saccade.cache.near import Counters, Near
from saccade.core.errors import DamagedError, InputError, SpaceError

ALL = slice(None)
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Tier:
    """Keys and values of some key heads, a block at a time, far from the device and read through a cache on it.

    Blocks are written once and then only read, so that rows of a batch (beams) share them: `select` copies numbers,
    not blocks. Each block's checksum is kept apart from it and compared whenever it is read: a block of another layer,
    or one that was written over, raises DamagedError. On a CPU a thread copies, on a GPU a stream of its own.

    Args:
        block: tokens in a block.
        budget: bytes of the block cache on the device; it never holds more.
        folder: a folder for mapped files; None = host memory, pinned where the keys are on a GPU.
        limit: bytes that the far side may use; None = what there is.
        name: said in errors: which layer, which heads.

    Shapes:
        append: k [B,G,n*block,D], v [B,G,n*block,Dv]; fetch: index [B,G,n] -> k [B,G,n*block,D], v [B,G,n*block,Dv]

    Raises:
        InputError: a budget smaller than one block, a folder that is none.

    Example:
        >>> tier = Tier(block=2, budget=1 << 12)
        >>> tier.append(torch.arange(8.0).view(1, 1, 4, 2), torch.arange(4.0).view(1, 1, 4, 1))
        >>> k, v = tier.fetch(torch.tensor([[[1]]]))
        >>> k.flatten().tolist(), v.flatten().tolist(), tier.counters.misses
        ([4.0, 5.0, 6.0, 7.0], [2.0, 3.0], 1)
    """

    def __init__(
        self, block: int, budget: int, folder: str | None = None, limit: int | None = None, name: str = "tier"
    ) -> None:
        if block < 1 or budget < 1:
            raise InputError(f"{name}: block and budget must be >= 1, got {block} tokens and {budget} bytes")
        if folder is not None and not os.path.isdir(folder):
            raise InputError(f"{name}: {folder!r} is no folder; make it, or give another")
        self.block, self.budget, self.folder, self.limit, self.name = block, budget, folder, limit, name
        self.split = 0  # width of keys; what follows in a row is the value
        self.arena: Arena | None = None
        self.near: Near | None = None
        self.table = torch.zeros(0, 0, 0, dtype=torch.long)  # [B,G,blocks] numbers of the blocks
        self.sums = torch.zeros(0, 0, 0, dtype=torch.long)  # their checksums
        self._weights = torch.zeros(0, dtype=torch.long)
        self._wrong: Tensor | None = None  # on a GPU: was any block damaged? looked at before the next read
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
        sums = self._sums(rows).cpu()
        slots = arena.take(len(rows))
        try:
            arena.write(slots, rows)
        except BaseException:
            arena.release(slots)
            raise
        # the cache may hold what stood under these numbers before
        near.forget(slots)
        self._set(*(torch.cat((a, b.view(B, G, -1)), 2) for a, b in ((self.table, slots), (self.sums, sums))))

    def prefetch(self, index: Tensor, rows: slice = ALL, heads: Sequence[int] | None = None) -> None:
        """Start moving blocks index [B,G,n] (-1: none) to the device; `fetch` waits for them."""
        if self.near is not None and self.blocks:
            slots, _ = self._numbers(index, rows, heads)
            wanted = slots[slots >= 0].unique()
            if len(wanted):
                self.near.want(wanted)

    def fetch(self, index: Tensor, rows: slice = ALL, heads: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of blocks index [B,G,n] on the device; -1 gives zeros.

        Args:
            index: blocks of each row and head.
            rows, heads: the rows and key heads (places in this tier, one may come twice) that `index` is for.

        Raises:
            InputError: a block that is not there, or more blocks than the cache holds.
            DamagedError: a block is not what was put away.
        """
        if self.near is None or self.arena is None:
            raise InputError(f"{self.name}: nothing was put away yet")
        self.check()
        slots, sums = self._numbers(index, rows, heads)
        flat = slots.flatten()
        wanted, place = flat[flat >= 0].unique(return_inverse=True)
        near = self.near
        got = near.get(wanted)
        # one block more, of zeros, is what -1 reads
        got = torch.cat((got, got.new_zeros(1, *got.shape[1:])))
        at = torch.full(flat.shape, len(wanted))
        at[flat >= 0] = place
        read = got[at.to(got.device)]
        wrong = self._sums(read) != sums.flatten().to(read.device)
        if read.is_cuda:
            # no waiting for the device here: the next read looks
            self._wrong = wrong.any() if self._wrong is None else self._wrong | wrong.any()
        elif bool(wrong.any()):
            which = wrong.nonzero().flatten()
            near.forget(flat[which].unique())
            self._damaged(f"{len(which)} of {len(wrong)} blocks")
        read = read.view(*slots.shape[:2], -1, self.arena.width)
        return read[..., : self.split], read[..., self.split :]

    def rows(self, index: Tensor, heads: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of single tokens index [B,G,n] straight from the far side, in host memory; -1 reads token 0.

        Checksums are of whole blocks, so single tokens come without them.
        """
        if self.arena is None:
            raise InputError(f"{self.name}: nothing was put away yet")
        index = index.cpu().long().clamp_min(0)
        if index.numel() and int(index.max()) >= self.tokens:
            raise InputError(f"{self.name}: token {int(index.max())} was asked for, {self.tokens} are here")
        table = self.table if heads is None else self.table[:, list(heads)]
        slots = table.gather(2, index // self.block)
        rows = self.arena.rows(slots.flatten(), (index % self.block).flatten()).view(*index.shape, -1)
        return rows[..., : self.split], rows[..., self.split :]

    def keys(self, first: int = 0, last: int | None = None, heads: Sequence[int] | None = None) -> Tensor:
        """Keys of tokens `first` to `last` in host memory [B,G,last-first,D]: what an index is built from."""
        G = self.table.shape[1] if heads is None else len(heads)
        index = torch.arange(first, self.tokens if last is None else last).expand(len(self.table), G, -1)
        return self.rows(index, heads)[0]

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
        other = Tier(self.block, self.budget, self.folder, self.limit, self.name)
        other.split, other.arena, other.near, other._weights = self.split, self.arena, self.near, self._weights
        if self.arena is not None:
            index = index.cpu()
            table = self.table.index_select(0, index)
            self.arena.hold(table)
            other._set(table, self.sums.index_select(0, index))
        return other

    def check(self) -> None:
        """Raise DamagedError if a block read since the last check was damaged; on a GPU this waits for it."""
        if self._wrong is not None:
            wrong, self._wrong = bool(self._wrong), None
            if wrong:
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
        places = self.budget // arena.block_bytes
        if places < 1:
            raise InputError(
                f"{self.name}: a cache of {self.budget} bytes does not hold one block of {arena.block_bytes} bytes "
                f"({self.block} tokens); give it more, or make blocks smaller"
            )
        if arena.limit is not None and arena.limit < B * G * arena.block_bytes:
            raise SpaceError(
                f"{self.name}: {arena.limit} bytes do not hold one block of {arena.block_bytes} bytes for each of "
                f"{B * G} heads"
            )
        near = Near(places, arena, k.device)
        self.split, self.arena, self.near = k.shape[3], arena, near
        # odd weights that differ from place to place: a block whose rows changed places is another block
        numbers = self.block * width
        self._weights = (torch.arange(numbers) * 2654435761 % (1 << 31) * 2 + 1).to(k.device)
        empty = torch.zeros(B, G, 0, dtype=torch.long)
        self._set(empty, empty)

    def _sums(self, rows: Tensor) -> Tensor:
        """One number for each block [n, block, width]; zero for a block of zeros."""
        ints = rows.contiguous().view(_INTS[rows.element_size()]).flatten(1)
        return (ints.long() * self._weights).sum(1)

    def _set(self, table: Tensor, sums: Tensor) -> None:
        """The blocks that this tier owns from now on; they are given back when it is collected."""
        assert self.arena is not None
        self.table, self.sums = table, sums
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _let_go, self.arena, self._held)
            # at the end of the process the files are gone anyway
            self._finalizer.atexit = False
        self._held[:] = [table]

    def _numbers(self, index: Tensor, rows: slice, heads: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        """The numbers in the arena of blocks `index`, -1 where there is none, and their checksums."""
        index = index.cpu().long()
        if index.numel() and (int(index.max()) >= self.blocks or int(index.min()) < -1):
            raise InputError(
                f"{self.name}: blocks {int(index.min())} to {int(index.max())} were asked for, {self.blocks} are here"
            )
        table, sums = (t[rows] if heads is None else t[rows][:, list(heads)] for t in (self.table, self.sums))
        at = index.clamp_min(0)
        return table.gather(2, at).masked_fill(index < 0, -1), sums.gather(2, at).masked_fill(index < 0, 0)

    def _given_back(self, slots: Tensor) -> None:
        assert self.arena is not None and self.near is not None
        self.arena.release(slots)
        self.near.forget(slots.flatten().unique())

    def _damaged(self, what: str) -> None:
        raise DamagedError(
            f"{self.name}: {what} read from the far tier are not what was put away (another layer's, or written over)"
        )


def _let_go(arena: Arena, held: list[Tensor]) -> None:
    for table in held:
        arena.release(table)
