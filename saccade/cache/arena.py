"""Arena: equal blocks of keys and values in host memory or in mapped files, with a count of their owners."""

from __future__ import annotations

import os
import shutil
import tempfile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saccade.core.errors import FileError, SaccadeError, SpaceError
from saccade.core.lasting import lasting
from saccade.kernels import transfer

LEAST = 16  # blocks in a slab, at least


class Arena:
    """The far side: slabs of equal blocks, pinned host memory or files mapped into memory, with a count of owners.

    A file is unlinked as soon as it is mapped: its space is given back when the last tensor on it dies, however the
    process ends. Apart from the blocks stand the checksum of what was last written into each, and a small one for each
    row of it, so that single rows can be checked, too.

    Args:
        block: rows (tokens) in a block.
        width: numbers in a row, keys and values side by side.
        dtype: of keys and values.
        folder: where the files go, or None for memory.
        pinned: page-locked memory, which a GPU reads by itself; beside files, for what is on its way.
        limit: bytes that may be used, None = what there is.
    """

    @lasting
    def __init__(
        self, block: int, width: int, dtype: torch.dtype, folder: str | None, pinned: bool, limit: int | None
    ) -> None:
        self.block, self.width, self.dtype = block, width, dtype
        self.folder, self.pinned, self.limit = folder, pinned, limit
        self.slabs: list[Tensor] = []
        self.starts: list[int] = []
        self.marks: list[Tensor] = []  # for each slab, a number for each row [blocks * block]
        self.stamps = torch.zeros(0, dtype=torch.long)  # the checksum of what was last written into each block
        self._bases = np.zeros(0, dtype=np.int64)  # addresses of the slabs
        self.owners = torch.zeros(0, dtype=torch.int32)
        self.free: list[int] = []

    @property
    def direct(self) -> bool:
        """Can a GPU read the slabs by itself?"""
        return self.pinned and self.folder is None

    @property
    def block_bytes(self) -> int:
        return self.block * self.width * self.dtype.itemsize

    def bytes(self) -> int:
        return len(self.owners) * self.block_bytes

    def reserve(self, count: int) -> None:
        """Make room for so many blocks more, so that putting them away cannot fail for lack of it.

        Raises:
            SpaceError, FileError: no space; nothing was changed.
        """
        if count > len(self.free):
            self._grow(count - len(self.free))

    def take(self, count: int) -> Tensor:
        """Numbers of `count` free blocks, with one owner each; room is made where there is none.

        Raises:
            SpaceError, FileError: no space; nothing was changed.
        """
        self.reserve(count)
        taken = torch.tensor(self.free[:count], dtype=torch.long)
        del self.free[:count]
        self.owners[taken] = 1
        return taken

    def hold(self, slots: Tensor) -> None:
        """One owner more for each of the blocks; a block may be named several times."""
        self.owners.index_add_(0, slots.flatten(), torch.ones(slots.numel(), dtype=torch.int32))

    def release(self, slots: Tensor) -> None:
        """One owner less; a block without owners is free."""
        flat = slots.flatten()
        self.owners.index_add_(0, flat, torch.full((flat.numel(),), -1, dtype=torch.int32))
        named = flat.unique()
        self.free += named[self.owners[named] == 0].tolist()

    def write(self, slots: Tensor, rows: Tensor, stamps: Tensor, marks: Tensor) -> None:
        """rows [n, block, width] into these blocks [n], with their checksums [n] and those of each row [n, block]."""
        for slab, number, at, mine in self._by_slab(slots):
            first, n = int(at[0]), len(at)
            if n == len(slots) and torch.equal(at, torch.arange(first, first + n)):
                # straight from the device
                slab[first : first + n].copy_(rows, non_blocking=True)
            else:
                slab[at] = rows[mine.to(rows.device)].to(slab.device)
            self.marks[number].view(-1, self.block)[at] = marks[mine]
        self.stamps[slots] = stamps
        if rows.is_cuda:
            # the host may read it, or other streams
            torch.cuda.current_stream(rows.device).synchronize()

    def read(self, slots: Tensor | NDArray[np.int64], out: Tensor | None = None) -> Tensor:
        """The blocks [n] as [n, block, width], in host memory: where `out` lies, or in memory of their own."""
        slots = torch.as_tensor(slots)
        if out is None:
            out = torch.empty(len(slots), self.block, self.width, dtype=self.dtype, pin_memory=self.pinned)
        for slab, _, at, mine in self._by_slab(slots):
            if len(mine) == len(slots):
                torch.index_select(slab, 0, at, out=out)
            else:
                out[mine] = slab[at]
        return out

    def rows(self, slots: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Single rows: number `offset` [n] of blocks `slots` [n] -> [n, width], and is each what was written [n]."""
        out = torch.empty(len(slots), self.width, dtype=self.dtype, pin_memory=self.pinned)
        want = torch.zeros(len(slots), dtype=torch.int32)
        for slab, number, at, mine in self._by_slab(slots):
            line = at * self.block + offset[mine]
            found = slab.view(-1, self.width).index_select(0, line)
            want[mine] = self.marks[number].index_select(0, line)
            if len(mine) == len(slots):
                out.copy_(found)
            else:
                out[mine] = found
        return out, transfer.marks(out) == want

    def addresses(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where blocks [n] begin in memory."""
        slab = np.searchsorted(np.asarray(self.starts), slots, side="right") - 1
        found: NDArray[np.int64] = self._bases[slab] + slots * self.block_bytes
        return found

    def _by_slab(self, slots: Tensor) -> list[tuple[Tensor, int, Tensor, Tensor]]:
        """(slab, its number, block in it, place in `slots`) for each slab that holds any of the blocks."""
        if not len(slots):
            return []
        if len(self.slabs) == 1:
            return [(self.slabs[0], 0, slots, torch.arange(len(slots)))]
        which = torch.bucketize(slots, torch.tensor(self.starts), right=True) - 1
        parts = []
        for number in which.unique().tolist():
            mine = (which == number).nonzero().flatten()
            parts.append((self.slabs[number], number, slots[mine] - self.starts[number], mine))
        return parts

    # blocks are given back whenever a cache is collected, in whatever mode that happens
    @lasting
    def _grow(self, missing: int) -> None:
        held = len(self.owners)
        room = max(missing, LEAST, held // 8)
        if self.direct:
            # pinned memory comes in powers of two: what it rounds up to is used
            room = max(room, (1 << (room * self.block_bytes - 1).bit_length()) // self.block_bytes)
        if self.limit is not None and (held + room) * self.block_bytes > self.limit:
            room = max(missing, self.limit // self.block_bytes - held)
        size = room * self.block_bytes
        if self.limit is not None and self.bytes() + size > self.limit:
            raise SpaceError(
                f"tier: {missing} blocks of {self.block_bytes} bytes more do not fit: {self.bytes()} of "
                f"{self.limit} bytes are in use; raise the limit, or name a folder with more space"
            )
        slab = self._mapped(size) if self.folder is not None else self._memory(size)
        self.slabs.append(slab.view(room, self.block, self.width))
        self.starts.append(held)
        self._bases = np.append(self._bases, slab.data_ptr() - held * self.block_bytes)
        self.marks.append(torch.zeros(room * self.block, dtype=torch.int32))
        self.stamps = torch.cat((self.stamps, torch.zeros(room, dtype=torch.long)))
        self.owners = torch.cat((self.owners, torch.zeros(room, dtype=torch.int32)))
        self.free += range(held, held + room)

    def _memory(self, size: int) -> Tensor:
        available = _available()
        if available is not None and size > available:
            raise SpaceError(
                f"tier: {size} bytes of host memory are needed, {available} are free; name a folder for a file"
            )
        try:
            return torch.empty(size // self.dtype.itemsize, dtype=self.dtype, pin_memory=self.pinned)
        except RuntimeError as error:
            raise SpaceError(f"tier: {size} bytes of host memory could not be had: {error}") from error

    def _mapped(self, size: int) -> Tensor:
        assert self.folder is not None
        name = None
        try:
            free = shutil.disk_usage(self.folder).free
            if size > free:
                raise SpaceError(f"tier: {size} bytes are needed in {self.folder}, {free} are free")
            handle, name = tempfile.mkstemp(prefix="saccade-tier-", dir=self.folder)
            try:
                # a sparse file would end the process by a bus error when the disk is full, not raise
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, size)
                else:
                    os.truncate(handle, size)
            finally:
                os.close(handle)
            return torch.from_file(name, shared=True, size=size // self.dtype.itemsize, dtype=self.dtype)
        except SaccadeError:
            raise
        except (OSError, RuntimeError) as error:
            raise FileError(f"tier: cannot make a file of {size} bytes in {self.folder}: {error}") from error
        finally:
            if name is not None:
                os.unlink(name)


def check_space(size: int, folder: str | None, name: str) -> None:
    """Raise SpaceError unless so many bytes are free, in host memory or in a folder: asked before any work.

    Example:
        >>> check_space(1 << 10, None, "offload")
    """
    if folder is None:
        free: int | None = _available()
    else:
        free = shutil.disk_usage(folder).free
    if free is not None and size > free:
        where = "of host memory" if folder is None else f"in {folder}"
        hint = "name a folder for files" if folder is None else "name one with more space"
        raise SpaceError(f"{name}: {size} bytes {where} are needed, {free} are free; {hint}, or read less")


def _available() -> int | None:
    """Bytes of memory that are free, where the system says so: of the machine, and of what the process may use."""
    free = []
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    group = "/sys/fs/cgroup/memory"
    try:
        with open(f"{group}.max") as most, open(f"{group}.current") as now, open(f"{group}.stat") as lines:
            spare = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
            free.append(int(most.read()) - int(now.read()) + spare)
    except (OSError, ValueError):
        # no such file, or "max"
        pass
    return min(free, default=None)
