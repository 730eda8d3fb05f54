"""Arena: equal blocks of keys and values in host memory or in mapped files, with a count of their owners."""

from __future__ import annotations

import os
import shutil
import tempfile

import torch
from torch import Tensor

from saccade.core.errors import FileError, SaccadeError, SpaceError

LEAST = 16  # blocks in a slab, at least


class Arena:
    """The far side: slabs of equal blocks, pinned host memory or files mapped into memory, with a count of owners.

    A file is unlinked as soon as it is mapped: its space is given back when the last tensor on it dies, however the
    process ends.

    Args:
        block: rows (tokens) in a block.
        width: numbers in a row, keys and values side by side.
        dtype: of keys and values.
        folder: where the files go, or None for memory.
        pinned: page-locked memory, which a GPU reads by itself.
        limit: bytes that may be used, None = what there is.
    """

    def __init__(
        self, block: int, width: int, dtype: torch.dtype, folder: str | None, pinned: bool, limit: int | None
    ) -> None:
        self.block, self.width, self.dtype = block, width, dtype
        self.folder, self.pinned, self.limit = folder, pinned, limit
        self.slabs: list[Tensor] = []
        self.starts: list[int] = []
        self.owners = torch.zeros(0, dtype=torch.int32)
        self.free: list[int] = []

    @property
    def block_bytes(self) -> int:
        return self.block * self.width * self.dtype.itemsize

    def bytes(self) -> int:
        return len(self.owners) * self.block_bytes

    def take(self, count: int) -> Tensor:
        """Numbers of `count` free blocks, with one owner each; room is made where there is none.

        Raises:
            SpaceError, FileError: no space; nothing was changed.
        """
        if count > len(self.free):
            self._grow(count - len(self.free))
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

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """rows [n, block, width] into these blocks [n]."""
        for slab, at, mine in self._by_slab(slots):
            slab[at] = rows[mine].to(slab.device)

    def read(self, slots: Tensor) -> Tensor:
        """The blocks [n] as [n, block, width], in host memory."""
        out = torch.empty(len(slots), self.block, self.width, dtype=self.dtype, pin_memory=self.pinned)
        for slab, at, mine in self._by_slab(slots):
            if len(mine) == len(slots):
                torch.index_select(slab, 0, at, out=out)
            else:
                out[mine] = slab[at]
        return out

    def rows(self, slots: Tensor, offset: Tensor) -> Tensor:
        """Single rows: number `offset` [n] of the blocks `slots` [n] -> [n, width]."""
        out = torch.empty(len(slots), self.width, dtype=self.dtype, pin_memory=self.pinned)
        for slab, at, mine in self._by_slab(slots):
            out[mine] = slab.view(-1, self.width)[at * self.block + offset[mine]]
        return out

    def _by_slab(self, slots: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(slab, block in it, place in `slots`) for each slab that holds any of the blocks."""
        if len(self.slabs) == 1:
            return [(self.slabs[0], slots, torch.arange(len(slots)))]
        which = torch.bucketize(slots, torch.tensor(self.starts), right=True) - 1
        parts = []
        for number in which.unique().tolist():
            mine = (which == number).nonzero().flatten()
            parts.append((self.slabs[number], slots[mine] - self.starts[number], mine))
        return parts

    def _grow(self, missing: int) -> None:
        held = len(self.owners)
        room = max(missing, LEAST, held // 8)
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


def _available() -> int | None:
    """Bytes of memory that are free, where the system says so."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
