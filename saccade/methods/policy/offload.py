"""Offload: first and recent tokens stay in the store, the others move to host memory or a file to be read there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from saccade.cache import cap
from saccade.cache.arena import check_space
from saccade.cache.far import KEY, Far, everything, far_of
from saccade.cache.store import DRAFT
from saccade.cache.tier import Tier
from saccade.core.call import Call
from saccade.core.errors import InputError, PlanError, SpaceError
from saccade.kernels.attend import attend
from saccade.kernels.merge import Out, merge
from saccade.methods.base import CachePolicy, check_ints

STAMP = 8  # bytes of a block's checksum in the block cache


class Wanted(NamedTuple):
    """What a layer has of it: the policy, how many key heads, and bytes of a token's key and value in one of them."""

    policy: Offload
    heads: int
    width: int


def check_room(wanted: Sequence[Wanted], tokens: int = 0, rows: int = 1) -> None:
    """Ask for the space of all layers together, before any work.

    Args:
        wanted: what each layer has; widths of 0 are not known, and nothing is asked for them.
        tokens: of the sequence; 0 = not known, where only what can hold nothing at all is refused.
        rows: of a batch whose rows differ in length: each has a block cache of its own. 1 where they do not.

    Raises:
        InputError: the block caches of all layers together hold less than a block for each.
        SpaceError: host memory, a folder or a policy's limit holds less.

    Example:
        >>> check_room([Wanted(Offload(limit=1000), heads=2, width=256)], tokens=10_000)
        Traceback (most recent call last):
        ...
        saccade.core.errors.SpaceError: Offload: a layer would put away 4784128 bytes, its limit is 1000; raise it
    """
    known = [each for each in wanted if each.width]
    least = max((each.policy.block * each.width + STAMP for each in known), default=0)
    cache = min((each.policy.cache for each in known), default=0)
    if cache < least * len(known) * rows:
        apart = f", each with {rows} rows of different lengths," if rows > 1 else ""
        raise InputError(
            f"Offload: a block cache of {cache} bytes for {len(known)} layers{apart} together does not hold one block "
            f"of {least} bytes for each; make cache {least * len(known) * rows} or more, or blocks smaller"
        )
    sizes: dict[str | None, int] = {}
    for policy, heads, width in known:
        size = policy.need(tokens, heads, width)
        if policy.limit is not None and size > policy.limit:
            raise SpaceError(f"Offload: a layer would put away {size} bytes, its limit is {policy.limit}; raise it")
        sizes[policy.folder] = sizes.get(policy.folder, 0) + size
    for folder, size in sizes.items():
        check_space(size, folder, "Offload")


@dataclass(frozen=True)
class Offload(CachePolicy):
    """Keys and values beyond device memory. No paper: the host memory tier that RetrievalAttention (arXiv 2409.10516)
    and others build on.

    Nothing is lost: the heads keep their first and newest tokens in the store, whole blocks of the others lie in host
    memory (pinned, beside a GPU) or in a file mapped into memory. Heads that no method serves read all of it, a piece
    at a time through a block cache on the device, and are dense; `retrieval` and `fetch` read what matters of it. Any
    other method would overlook what is far away: to decode, it is refused; a later prompt it would read is read exactly
    instead, by streaming what is far past the queries, chunk by chunk.

    Args:
        sink: tokens kept in the store from the start of the sequence.
        recent: tokens kept there from its end, the newest included.
        block: tokens that move at a time.
        cache: bytes of the block cache on the device, for all layers of a session's cache together (and for all rows,
            where they differ in length); never exceeded, shared equally.
        folder: a folder for files; None = host memory.
        limit: bytes that each layer's far side may use; None = what there is.
        expect: tokens that each layer will put away in all; room for them is made with the first, so that a lack of
            space is told then. 0 = room is made as tokens come.

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
    expect: int = 0

    def __post_init__(self) -> None:
        check_ints(self, sink=0, recent=1, block=1, cache=1, expect=0)
        if self.limit is not None and (type(self.limit) is not int or self.limit < 1):
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
            said = f"offload, heads {list(call.heads)}"
            tier = Tier(self.block, self.cache, self.folder, self.limit, said, call.memory.get(cap.KEY))
            far = Far(call.heads, share, self.sink, tier)
        self._continues(far, call)
        # before the store forgets them: on an error here it still has them all
        gone = slice(self.sink, self.sink + count)
        if self.expect > far.tier.tokens and not far.tier.blocks:
            far.tier.reserve(k, v, max(self.expect, count))
        far.tier.append(k[:, :, gone], v[:, :, gone])
        call.memory[name] = far
        ends = torch.cat((torch.arange(self.sink), torch.arange(self.sink + count, M)))
        return ends.to(k.device)[None, None]

    def need(self, tokens: int, heads: int, width: int) -> int:
        """Bytes on the far side for a sequence of so many tokens, or for those expected, for each layer and row.

        Args:
            tokens: of the sequence; 0 = not known, at least a block then.
            heads: key heads.
            width: bytes of a token's key and value in one head.
        """
        blocks = max(0, tokens - self.sink - self.recent - DRAFT) // self.block if tokens else 1
        if blocks:
            # room for what is expected is made with the first
            blocks = max(blocks, -(-self.expect // self.block))
        return blocks * self.block * heads * width

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
