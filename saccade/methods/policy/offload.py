"""Offload: first and recent tokens stay in the store, the others move to host memory or a file to be read there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.cache.far import KEY, Far, everything, far_of
from saccade.cache.store import DRAFT
from saccade.cache.tier import Tier
from saccade.core.call import Call
from saccade.core.errors import InputError, PlanError
from saccade.kernels.attend import attend
from saccade.kernels.merge import Out, merge
from saccade.methods.base import CachePolicy, check_ints


@dataclass(frozen=True)
class Offload(CachePolicy):
    """Keys and values beyond device memory. No paper: the host memory tier that RetrievalAttention (arXiv 2409.10516)
    and others build on.

    Nothing is lost: the heads keep their first and newest tokens in the store, whole blocks of the others lie in host
    memory (pinned, beside a GPU) or in a file mapped into memory. Heads that no method serves read all of it, a piece
    at a time through a block cache on the device, and are dense; `retrieval` and `fetch` read what matters of it. Any
    other method would overlook what is far away, and is refused once something is.

    Args:
        sink: tokens kept in the store from the start of the sequence.
        recent: tokens kept there from its end, the newest included.
        block: tokens that move at a time.
        cache: bytes of the block cache on the device, for each layer (where rows differ in length, for each row).
        folder: a folder for files; None = host memory.
        limit: bytes that each layer's far side may use; None = what there is.

    Shapes:
        k [B,g,M,D] -> slots [1, 1, sink + recent + 16 + up to block - 1]

    Raises:
        InputError: arguments that cannot be, a folder that is not there, a cache smaller than a block.
        SpaceError, FileError: no space for a block; the store then keeps what it had.

    Departs from the paper: all of it in torch, on any device; what is moved is checked by a checksum when it is read.

    Example:
        >>> Offload(sink=16, recent=64, block=32).claim(100_000)
        127
    """

    lossless: ClassVar[bool] = True

    sink: int = 128
    recent: int = 512
    block: int = 64
    cache: int = 256 << 20
    folder: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        check_ints(self, sink=0, recent=1, block=1, cache=1)
        if self.limit is not None and (not isinstance(self.limit, int) or self.limit < 1):
            raise InputError(f"Offload: limit must be bytes (int >= 1) or None, got {self.limit!r}")
        if self.folder is not None and not (os.path.isdir(self.folder) and os.access(self.folder, os.W_OK)):
            raise InputError(f"Offload: {self.folder!r} is no folder that can be written to; make it, or give another")

    def keep(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
        M = call.shape.M
        count = (M - self.sink - self.recent - DRAFT) // self.block * self.block
        if count < 1:
            return None
        name = f"{KEY} {call.heads}"
        far = call.memory.get(name)
        if far is None:
            share = call.shape.H // call.shape.G
            tier = Tier(self.block, self.cache, self.folder, self.limit, f"offload, heads {list(call.heads)}")
            far = Far(call.heads, share, self.sink, tier)
        self._continues(far, call)
        # before the store forgets them: on an error here it still has them all
        gone = slice(self.sink, self.sink + count)
        far.tier.append(k[:, :, gone], v[:, :, gone])
        call.memory[name] = far
        ends = torch.cat((torch.arange(self.sink), torch.arange(self.sink + count, M)))
        return ends.to(k.device)[None, None]

    def claim(self, seen: int) -> int:
        return min(seen, self.sink + self.recent + DRAFT + self.block - 1)

    def away(self, call: Call) -> bool:
        return far_of(call) is not None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Out:
        """Dense attention, for heads that no method serves."""
        near, far = attend(q, k, v, None, call), far_of(call)
        return near if far is None else merge([near, everything(q, far, call)])

    def estimate(self, call: Call) -> float:
        """Pairs that `attend` scores."""
        B, H, _, N, M = call.shape
        far = far_of(call)
        return float(B * H * N * (M + (0 if far is None else far.tier.tokens)))

    def _continues(self, far: Far, call: Call) -> None:
        """The next token to go must be the one behind those that went."""
        first = self.sink if call.k_pos is None else int(call.k_pos[0, 0, self.sink])
        if first != self.sink + far.tier.tokens:
            raise PlanError(
                f"Offload: the store's token {first} would move behind {far.tier.tokens} tokens from {self.sink} on; "
                "reset() the cache before another text"
            )
