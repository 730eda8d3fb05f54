"""Near: the blocks of an arena that are on the device, in so many places and no more."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.cache.arena import Arena
from saccade.core.errors import InputError


@dataclass
class Counters:
    """What reading cost: blocks found in the cache, blocks that were not, bytes moved between far and near."""

    hits: int = 0
    misses: int = 0
    moved: int = 0


class Near:
    """The near side: blocks on the device, the least recently used of which gives way; never more than its places.

    It is no larger than the arena. When that has grown it is made anew and starts empty: beside a copy of the old one
    it would be larger than it may.

    Args:
        places: blocks that it holds at most.
        arena: where blocks come from.
        device: where they go.
    """

    def __init__(self, places: int, arena: Arena, device: torch.device) -> None:
        self.arena, self.places, self.device = arena, places, device
        self.data = torch.zeros(0, arena.block, arena.width, dtype=arena.dtype, device=device)
        self.holds = torch.full((0,), -1)  # the block in each place
        self.used = torch.zeros(0, dtype=torch.long)  # when it was last asked for
        self.place = torch.full((0,), -1)  # the place of each block
        self.clock = 0
        self.counters = Counters()
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker: ThreadPoolExecutor | None = None
        self._coming: list[tuple[Tensor, Any]] = []  # blocks on their way, and what to wait for

    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def want(self, slots: Tensor) -> None:
        """Start moving those of the blocks [n] (each named once) that are not here."""
        if len(slots) > self.places:
            raise InputError(f"tier: {len(slots)} blocks were asked for at once, the cache holds {self.places}")
        if len(self.place) < len(self.arena.owners):
            self._grow()
        self.clock += 1
        place = self.place[slots]
        here = place >= 0
        self.used[place[here]] = self.clock
        missing = slots[~here]
        self.counters.hits += len(slots) - len(missing)
        self.counters.misses += len(missing)
        if not len(missing):
            return
        self.counters.moved += len(missing) * self.arena.block_bytes
        # what was asked for just now has the newest time, so it is the last to give way
        oldest = self.used.topk(len(missing), largest=False).indices
        self.forget(self.holds[oldest])
        self.place[missing], self.holds[oldest], self.used[oldest] = oldest, missing, self.clock
        self._coming.append((missing, self._move(missing, oldest)))

    def get(self, slots: Tensor) -> Tensor:
        """The blocks [n] as [n, block, width] on the device; a copy, so that they may give way afterwards."""
        self.want(slots)
        self.settle()
        return self.data[self.place[slots].to(self.device)]

    def forget(self, slots: Tensor) -> None:
        """Drop blocks that are written over or given up; -1 is nothing."""
        slots = slots[slots >= 0]
        place = self.place[slots[slots < len(self.place)]]
        place = place[place >= 0]
        self.place[self.holds[place]] = -1
        self.holds[place], self.used[place] = -1, 0

    def settle(self) -> None:
        """Wait for what is on its way; what failed to come is forgotten."""
        coming, self._coming = self._coming, []
        failed = None
        for missing, sign in coming:
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

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None

    def _grow(self) -> None:
        blocks = len(self.arena.owners)
        more = torch.full((blocks - len(self.place),), -1)
        self.place = torch.cat((self.place, more))
        size = min(self.places, blocks)
        if size > len(self.data):
            self.settle()
            self.place.fill_(-1)
            self.holds, self.used = torch.full((size,), -1), torch.zeros(size, dtype=torch.long)
            # the old one goes before the new one comes
            self.data = self.data[:0].clone()
            self.data = self.data.new_zeros(size, *self.data.shape[1:])

    def _move(self, slots: Tensor, places: Tensor) -> Any:
        if self._side is None:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, "saccade-tier")
            return self._worker.submit(self._copy, slots, places)
        # places that give way may still be read by what was launched before
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            self._copy(slots, places)
            return self._side.record_event()

    def _copy(self, slots: Tensor, places: Tensor) -> None:
        rows = self.arena.read(slots)
        self.data.index_copy_(0, places.to(self.device), rows.to(self.device, non_blocking=True))
