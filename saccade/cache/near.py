"""Near: the blocks of an arena that are on the device, in so many places and no more."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saccade.cache.arena import Arena
from saccade.cache.cap import Cap
from saccade.core.errors import InputError
from saccade.core.lasting import lasting
from saccade.kernels import transfer

Ints = NDArray[np.int64]
STAGED = 1 << 22  # bytes that are on their way beside the cache, where the GPU does not read host memory by itself
SWEPT = 1 << 22  # bytes that the host reads in one go when it reads everything once: what stays in a processor's cache


@dataclass
class Counters:
    """What reading cost: blocks found in the cache, blocks that were not, and bytes.

    Bytes `moved` into the cache, `swept` past it, and of `single` tokens.
    """

    hits: int = 0
    misses: int = 0
    moved: int = 0
    swept: int = 0
    single: int = 0


class Near:
    """The near side: blocks on the device, the least recently used of which gives way; never more than its share.

    With each block stands the checksum of what arrived there. The books are kept in host memory. On a CPU a thread
    copies; on a GPU a stream of its own, which waits for what was launched before (it may still read what gives way)
    and for which what reads the blocks waits.

    It is no larger than the arena. When that has grown it is made anew and starts empty: beside a copy of the old one
    it would be larger than it may.

    Args:
        arena: where blocks come from.
        device: where they go.
        cap: the budget that it shares.
        budget: bytes that it brings into the cap as the most for all.
        name: said in errors.
    """

    # a thread writes into it, and a thread is in no mode
    @lasting
    def __init__(self, arena: Arena, device: torch.device, cap: Cap, budget: int, name: str = "tier") -> None:
        self.arena, self.device, self.cap, self.name = arena, device, cap, name
        self.data = torch.zeros(0, arena.block, arena.width, dtype=arena.dtype, device=device)
        self.sums = torch.zeros(0, dtype=torch.long, device=device)
        self.holds: Ints = np.zeros(0, dtype=np.int64)  # the block in each place, -1 = none
        self.used: Ints = np.zeros(0, dtype=np.int64)  # when it was last asked for
        self.place: Ints = np.zeros(0, dtype=np.int64)  # the place of each block, -1 = none
        self.clock = 0
        self.counters = Counters()
        self._line: Ints = np.zeros(0, dtype=np.int64)  # places, the least recently used first ...
        self._since: Ints = np.zeros(0, dtype=np.int64)  # ... as of these times; who was asked for since is not meant
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker: ThreadPoolExecutor | None = None
        self._coming: list[tuple[Ints, Any, Any]] = []  # blocks on their way, what to wait for, what to hold until then
        cap.join(self, budget)

    @property
    def least(self) -> int:
        """Bytes of a place: a block and its checksum."""
        return self.arena.block_bytes + 8

    @property
    def places(self) -> int:
        """Blocks that it may hold."""
        return self.cap.share // self.least

    def bytes(self) -> int:
        """Bytes on the device."""
        return self.data.numel() * self.data.element_size() + self.sums.numel() * 8

    def want(self, slots: Ints) -> None:
        """Start moving those of the blocks [n] (each named once) that are not here."""
        self.fit()
        if len(slots) > len(self.data):
            raise InputError(f"{self.name}: {len(slots)} blocks were asked for at once, the cache holds {self.places}")
        self.clock += 1
        place = self.place[slots]
        here = place >= 0
        self.used[place[here]] = self.clock
        missing = slots[~here]
        self.counters.hits += len(slots) - len(missing)
        self.counters.misses += len(missing)
        if not len(missing):
            return
        taken = self._oldest(len(missing))
        self._leave(taken)
        self.place[missing], self.holds[taken] = taken, missing
        self.counters.moved += len(missing) * self.arena.block_bytes
        self._move(missing, taken)

    def line_up(self, slots: Ints, first: int) -> Tensor:
        """Start moving blocks [n] into the places from `first` on, in this order; they are not found there later.

        Returns:
            Where they will be after `settle` [n, block, width].
        """
        taken = np.arange(first, first + len(slots))
        self._leave(taken)
        self.holds[taken], self.used[taken] = -1, 0
        self._line = self._line[:0]
        self.counters.swept += len(slots) * self.arena.block_bytes
        self._move(slots, taken)
        return self.data[first : first + len(slots)]

    def half(self) -> int:
        """Blocks that a sweep reads while as many others arrive; all there are if there is but one place."""
        most = max(1, len(self.data) // 2)
        return most if self._side is not None else min(most, max(1, SWEPT // self.arena.block_bytes))

    def forget(self, slots: Ints) -> None:
        """Drop blocks that are written over or given up; -1 is nothing."""
        slots = slots[(slots >= 0) & (slots < len(self.place))]
        place = self.place[slots]
        place = place[place >= 0]
        if len(place):
            self._leave(place)
            self.holds[place], self.used[place] = -1, 0
            # empty places come first in the next line
            self._line = self._line[:0]

    def settle(self) -> None:
        """Wait for what is on its way; what failed to come is forgotten."""
        coming, self._coming = self._coming, []
        failed = None
        for missing, sign, _ in coming:
            if isinstance(sign, Future):
                try:
                    sign.result()
                except Exception as error:
                    failed = error
                    self.forget(missing)
            elif sign is not None:
                torch.cuda.current_stream(self.device).wait_event(sign)
        if failed is not None:
            raise failed

    def fit(self) -> None:
        """As large as the arena, or as the share if that is less."""
        blocks = len(self.arena.owners)
        if len(self.place) < blocks:
            self.place = np.concatenate((self.place, np.full(blocks - len(self.place), -1)))
        size = min(self.places, blocks)
        if size > len(self.data):
            self._make(size)

    def shrink(self) -> None:
        """No more than the share."""
        if len(self.data) > self.places:
            self._make(0)

    def close(self) -> None:
        """Stop the thread."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    @lasting
    def _make(self, size: int) -> None:
        self.settle()
        self.place.fill(-1)
        self.holds, self.used = np.full(size, -1), np.zeros(size, dtype=np.int64)
        self._line = self._line[:0]
        # the old one goes before the new one comes
        self.data, self.sums = self.data[:0].clone(), self.sums[:0].clone()
        self.data, self.sums = _zeros(size, self.data), self.sums.new_zeros(size)
        if self._side is not None:
            for t in (self.data, self.sums):
                t.record_stream(self._side)

    def _leave(self, places: Ints) -> None:
        """What stands in these places is no longer found there."""
        gone = self.holds[places]
        self.place[gone[gone >= 0]] = -1

    def _oldest(self, count: int) -> Ints:
        """So many places, the least recently used first; from now on they are the newest."""
        found: list[Ints] = []
        while count:
            if not len(self._line):
                self._line = np.argsort(self.used, kind="stable")
                self._since = self.used[self._line]
            ahead = min(len(self._line), 2 * count)
            still = np.flatnonzero(self.used[self._line[:ahead]] == self._since[:ahead])[:count]
            taken = self._line[still]
            end = int(still[-1]) + 1 if len(still) == count else ahead
            self._line, self._since = self._line[end:], self._since[end:]
            self.used[taken] = self.clock
            found.append(taken)
            count -= len(taken)
        return np.concatenate(found)

    def _move(self, slots: Ints, places: Ints) -> None:
        sign, held = None, None
        if self._side is None:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "saccade-tier")
            sign = self._worker.submit(self._copy, slots, places)
        else:
            fast = transfer.kernel() if self.arena.direct and self.arena.block_bytes % 8 == 0 else None
            if fast is not None:
                both = np.stack((self.arena.addresses(slots), places))
                held = torch.from_numpy(both).pin_memory().to(self.device, non_blocking=True)
            # places that give way may still be read by what was launched before
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                if fast is not None and held is not None:
                    fast.bring(held[0], held[1], self.data, self.sums)
                else:
                    self._copy(slots, places)
                sign = self._side.record_event()
        self._coming.append((slots, sign, held))

    def _copy(self, slots: Ints, places: Ints) -> None:
        """A few blocks at a time through host memory; straight to places that stand side by side there."""
        step = max(1, STAGED // self.arena.block_bytes)
        straight = self.device.type == "cpu" and bool((places[1:] == places[:-1] + 1).all())
        for a in range(0, len(slots), step):
            some, at = slots[a : a + step], places[a : a + step]
            if straight:
                here = slice(int(at[0]), int(at[0]) + len(at))
                self.sums[here] = transfer.sums(self.arena.read(some, self.data[here]))
                continue
            rows = self.arena.read(some).to(self.device, non_blocking=True)
            where = torch.from_numpy(at).to(self.device)
            self.data.index_copy_(0, where, rows)
            self.sums.index_copy_(0, where, transfer.sums(rows))


def _zeros(size: int, like: Tensor) -> Tensor:
    """So many blocks of zeros [size, block, width]; in host memory a place costs nothing until it is written."""
    if like.device.type != "cpu" or not size:
        return like.new_zeros(size, *like.shape[1:])
    # torch writes its zeros; those of numpy come from the system, page by page, when they are touched
    count = size * like.shape[1] * like.shape[2] * like.element_size()
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(like.dtype).view(size, *like.shape[1:])
