"""Fixed: a store whose next slots a tensor names, so that one captured step can be replayed while the store grows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.cache.store import Keeper, Store
from saccade.core.errors import UnsupportedError


class Stretch(NamedTuple):
    """One group with all its room: slots that are not filled yet hold zeros at positions that lie in the future.

    Shapes: k [B,g,M,D], v [B,g,M,Dv], pos int32 [1|B,1|g,M], bias [B,g,M] or None.
    """

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    pos: Tensor
    policy: Keeper | None
    bias: Tensor | None


class Fixed:
    """A store during steps of one token: nothing is evicted, no shape changes, and no number is read by the host.

    Every group gets room for `room` tokens more. Token number `step` after the start goes to the slot that many places
    behind what the group held, by a device-side index; causality by position hides the slots still to come. Closing
    tells the store how many tokens came; its policies then evict, with the queries of the last step before them.

    Args:
        store: rows of equal length without padding.
        room: tokens that will come at most.
        step: int64 [1] on the store's device, tokens that came so far; shared by all layers, counted up by the caller.

    Raises:
        UnsupportedError: rows that differ in length, or an empty store.

    Example:
        >>> store = Store([], kv_heads=1)
        >>> store.append(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4))
        >>> step = torch.zeros(1, dtype=torch.long)
        >>> fixed = Fixed(store, 3, step)
        >>> fixed.append(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
        >>> fixed.q_pos.tolist(), fixed.stretches[0].k[0, 0, :, 0].tolist()
        ([[5]], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
        >>> fixed.close(1)
        >>> store.seen
        [6]
    """

    def __init__(self, store: Store, room: int, step: Tensor) -> None:
        if len(store.memory) != 1:
            raise UnsupportedError(
                "steps of a fixed shape need rows of equal length in the store, and a prompt that was read; "
                "run ragged batches without them"
            )
        store.settle()
        self.store, self.room, self.step = store, room, step
        self.seen = store.seen[0]
        self.asked: Tensor | None = None  # queries of the newest step
        self.memory = store.memory_of(slice(0, len(store.seen)))
        self.stretches: list[Stretch] = []
        for group in store.groups:
            group.reserve(room)
            assert group.k is not None and group.v is not None
            held = group.lengths[0]
            most = held + room
            # an empty slot may hold anything, and 0 * NaN is NaN
            group.k[:, :, held:most].zero_()
            group.v[:, :, held:most].zero_()
            ahead = torch.arange(self.seen, self.seen + room, dtype=torch.int32, device=group.k.device)
            if group.pos is None:
                pos = torch.arange(most, dtype=torch.int32, device=group.k.device)[None, None]
            else:
                group.pos[:, :, held:most] = ahead
                pos = group.pos[:, :, :most]
            bias = None
            if group.bias is not None:
                group.bias[:, :, held:most].zero_()
                bias = group.bias[:, :, :most]
            k, v = group.k[:, :, :most], group.v[:, :, :most]
            self.stretches.append(Stretch(group.heads, k, v, pos, group.policy, bias))
        # where each group's heads are in [all heads of group 1, of group 2, ...]
        order = torch.tensor([h for group in store.groups for h in group.heads], device=step.device)
        self.order = order.argsort()
        self.ids = [torch.tensor(group.heads, device=step.device) for group in store.groups]
        self._slots = [torch.tensor([group.lengths[0]], device=step.device) for group in store.groups]

    @property
    def q_pos(self) -> Tensor:
        """Position of the token of this step, int64 [1,1]."""
        return (self.step + self.seen)[None]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write the token of this step, k [B,G,1,D] and v [B,G,1,Dv], into every group."""
        for stretch, ids, base in zip(self.stretches, self.ids, self._slots, strict=True):
            slot = base + self.step
            mine = (k, v) if len(self.ids) == 1 else (k.index_select(1, ids), v.index_select(1, ids))
            stretch.k.index_copy_(2, slot, mine[0])
            stretch.v.index_copy_(2, slot, mine[1])

    def close(self, steps: int) -> None:
        """Give the store back with so many tokens more."""
        if not 0 <= steps <= self.room:
            raise UnsupportedError(f"{steps} steps were made, there was room for {self.room}")
        self.store.extend(steps)
        if steps and self.asked is not None:
            self.store.asked([self.asked], now=True)
