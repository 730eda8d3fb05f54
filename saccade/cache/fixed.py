"""Fixed: a store whose next slots a tensor names, so that one captured step can be replayed while the store grows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.cache.group import Keeper
from saccade.cache.store import Store
from saccade.core.call import Filled
from saccade.core.errors import UnsupportedError
from saccade.core.lasting import lasting


class Place:
    """Where the next token comes, for the device and for the host; one for all layers.

    Attributes:
        at: position of the next token, int64 [1] on the device.
        length: tokens stored with it, int64 [1] on the device.
        made: steps that were made, an int.

    Args:
        seen: tokens that came before the steps.
        device: of the store.

    Example:
        >>> place = Place(7, torch.device("cpu"))
        >>> place.tick()
        >>> place.at.tolist(), place.length.tolist(), place.made
        ([8], [9], 1)
    """

    def __init__(self, seen: int, device: torch.device) -> None:
        self.at = torch.tensor([seen], device=device)
        self.length = self.at + 1
        self.made = 0

    def tick(self) -> None:
        """A step was made."""
        self.at += 1
        self.length += 1
        self.made += 1


class Stretch(NamedTuple):
    """One group with all its room: slots that are not filled yet hold zeros at positions that lie in the future.

    `straight` says that slot = position.

    Shapes: k [B,g,M,D], v [B,g,M,Dv], pos int32 [1|B,1|g,M], bias [B,g,M] or None.
    """

    heads: tuple[int, ...]
    k: Tensor
    v: Tensor
    pos: Tensor
    policy: Keeper | None
    bias: Tensor | None
    straight: bool


class Fixed:
    """A store during steps of one token: nothing is evicted, no shape changes, and no number is read by the host.

    Every group gets room for `room` tokens more. The token of a step goes to the slot behind what the group holds, by a
    device-side index; causality by position hides the slots still to come. Closing tells the store how many tokens
    came; its policies then evict, with the queries of the last step before them.

    Methods that remember something find `call.filled` where slots are positions. What they do follows these rules:

    - Tensors of their memory have the size of all the room from the first step on, and are written in place.
    - An entry of the memory counts as ready for these steps when its "slots" is the call's M; it is at most the number
      of tokens before that. Afterwards "slots" is cut to the tokens that came, and the entry's "close", if there is
      one, is called with nothing: the host may then wait for the device.
    - What a step does may depend on the position only as far as the entry's "turn" says: a function from a position
      (int) to anything that can be compared. A captured step is replayed at positions of the same turn.
    - A step is rehearsed before it is captured, with any token. What it writes must come out right when the same step
      is done again with the real one.

    Args:
        store: rows of equal length without padding.
        room: tokens that will come at most.
        place: shared by all layers, ticked by the caller after each step.

    Raises:
        UnsupportedError: rows that differ in length, or an empty store.

    Example:
        >>> store = Store([], kv_heads=1)
        >>> store.append(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4))
        >>> fixed = Fixed(store, 3, Place(5, torch.device("cpu")))
        >>> fixed.append(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
        >>> fixed.q_pos.tolist(), fixed.stretches[0].k[0, 0, :, 0].tolist()
        ([[5]], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
        >>> fixed.close(1)
        >>> store.seen
        [6]
    """

    def __init__(self, store: Store, room: int, place: Place) -> None:
        if len(store.memory) != 1:
            raise UnsupportedError(
                "steps of a fixed shape need rows of equal length in the store, and a prompt that was read; "
                "run ragged batches without them"
            )
        store.settle()
        self.store, self.room, self.place = store, room, place
        self.seen = store.seen[0]
        self.asked: Tensor | None = None  # queries of the newest step
        self.memory = store.memory_of(slice(0, len(store.seen)))
        self._cut(self.seen)
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
            straight = group.pos is None
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
            self.stretches.append(Stretch(group.heads, k, v, pos, group.policy, bias, straight))
        # where each group's heads are in [all heads of group 1, of group 2, ...]
        device = place.at.device
        order = torch.tensor([h for group in store.groups for h in group.heads], device=device)
        self.order = order.argsort()
        self.ids = [torch.tensor(group.heads, device=device) for group in store.groups]
        self._gone = [self.seen - group.lengths[0] for group in store.groups]

    @property
    def q_pos(self) -> Tensor:
        """Position of the token of this step, int64 [1,1]."""
        return self.place.at[None]

    def filled(self, stretch: Stretch) -> Filled | None:
        """What the calls of a group are told of its slots."""
        if not stretch.straight:
            return None
        return Filled(self.place.length, self.seen + 1, self.seen + self.place.made)

    def turns(self, at: int) -> tuple[object, ...]:
        """What the methods of this layer say of a step at a position: steps with equal turns do the same."""
        held = [entry["turn"] for entry in self.memory.values() if isinstance(entry, dict) and "turn" in entry]
        return tuple(turn(at) for turn in held)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write the token of this step, k [B,G,1,D] and v [B,G,1,Dv], into every group."""
        for stretch, ids, gone in zip(self.stretches, self.ids, self._gone, strict=True):
            slot = self.place.at - gone if gone else self.place.at
            mine = (k, v) if len(self.ids) == 1 else (k.index_select(1, ids), v.index_select(1, ids))
            stretch.k.index_copy_(2, slot, mine[0])
            stretch.v.index_copy_(2, slot, mine[1])

    @lasting
    def close(self, steps: int) -> None:
        """Give the store back with so many tokens more."""
        if not 0 <= steps <= self.room:
            raise UnsupportedError(f"{steps} steps were made, there was room for {self.room}")
        self.store.extend(steps)
        self._cut(self.seen + steps)
        if steps and self.asked is not None:
            self.store.asked([self.asked], now=True)

    def _cut(self, slots: int) -> None:
        """No entry of the memory describes more than so many tokens."""
        for entry in self.memory.values():
            if isinstance(entry, dict):
                if entry.get("slots", 0) > slots:
                    entry["slots"] = slots
                entry.pop("turn", None)
                entry.pop("close", lambda: None)()
