"""A group: some key heads of a layer that one policy keeps, in tensors with room to grow.

Appending is in place; room grows by an eighth, and is given back once most of what was held is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError

ROOM = 64  # slots added beyond what is needed


class Fold(NamedTuple):
    """One kept slot that from now on stands for all that was dropped.

    Args:
        at: which of the kept slots it is.
        k, v: what it holds [b, g, D] and [b, g, Dv].
        bias: added to its logit [b, g]: log n for a slot that stands for n tokens.
    """

    at: int
    k: Tensor
    v: Tensor
    bias: Tensor


class Keeper(Protocol):
    """What the store asks of a policy: `saccade.methods.base.CachePolicy` is one."""

    def keep(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
        """Slots that stay [B|1, g|1, K], ascending, or None for all."""

    def fold(self, k: Tensor, v: Tensor, bias: Tensor | None, slots: Tensor, call: Call) -> Fold | None:
        """What a kept slot holds for the dropped ones, or None. k, v, bias are all slots, `slots` those that stay."""


class View(NamedTuple):
    """What one group holds for some rows of the batch.

    Shapes: k [B,g,M,D], v [B,g,M,Dv], pos [1|B, 1|g, M] or None where slot = position, bias [B,g,M] on the logits of
    slots or None where it is 0.
    """

    heads: tuple[int, ...]
    rows: slice
    k: Tensor
    v: Tensor
    pos: Tensor | None
    policy: Keeper | None
    bias: Tensor | None = None


class Group:
    """Some key heads of a layer with one policy: tensors with room to grow, and a length per row.

    Args:
        heads: the key heads' ids in the layer.
        policy: what survives; None keeps everything.
    """

    def __init__(self, heads: Sequence[int], policy: Keeper | None = None) -> None:
        self.heads = tuple(heads)
        self.policy = policy
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.pos: Tensor | None = None
        self.bias: Tensor | None = None  # made when a policy first folds
        self.lengths: list[int] = []

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: Sequence[int]) -> None:
        """Add tokens k [B,g,n,D], v [B,g,n,Dv] behind what each row holds; `valid` [B,n] leaves out padding."""
        B, g, n, _ = k.shape
        if self.k is None or self.v is None:
            self.lengths = [0] * B
            self._allocate(B, g, n + ROOM, k, v)
        added = [n] * B if valid is None else valid.sum(1).tolist()
        self._reserve(max(length + more for length, more in zip(self.lengths, added, strict=True)))
        assert self.k is not None and self.v is not None
        if valid is None and len(set(self.lengths)) == 1:
            at = self.lengths[0]
            self.k[:, :, at : at + n], self.v[:, :, at : at + n] = k, v
        else:
            for row, more in enumerate(added):
                real = slice(None) if valid is None else valid[row]
                at = self.lengths[row]
                self.k[row, :, at : at + more] = k[row][:, real]
                self.v[row, :, at : at + more] = v[row][:, real]
        if self.pos is not None:
            for row, more in enumerate(added):
                at = self.lengths[row]
                self.pos[row, :, at : at + more] = torch.arange(seen[row], seen[row] + more, device=k.device)
                if self.bias is not None:
                    self.bias[row, :, at : at + more] = 0.0
        self.lengths = [length + more for length, more in zip(self.lengths, added, strict=True)]

    def view(self, rows: slice) -> View:
        """What these rows hold; they must be of equal length."""
        assert self.k is not None and self.v is not None
        M = self.lengths[rows][0]
        pos = None if self.pos is None else self.pos[rows, :, :M]
        bias = None if self.bias is None else self.bias[rows, :, :M]
        return View(self.heads, rows, self.k[rows, :, :M], self.v[rows, :, :M], pos, self.policy, bias)

    def keep(self, rows: slice, slots: Tensor, fold: Fold | None = None) -> None:
        """Keep these slots [b|1, g|1, K] of the rows and forget the rest, or fold it into one of them."""
        assert self.k is not None and self.v is not None
        B, g, room, _ = self.k.shape
        if self.pos is None:
            self.pos = torch.arange(room, dtype=torch.int32, device=self.k.device).expand(B, g, room).contiguous()
        b = len(range(*rows.indices(B)))
        K = slots.shape[2]
        slots = slots.long().expand(b, g, K)
        kept = []
        for name in ("k", "v"):
            t = getattr(self, name)[rows]
            kept.append(t.gather(2, slots[..., None].expand(-1, -1, -1, t.shape[3])))
        pos = self.pos[rows].gather(2, slots)
        if fold is not None and self.bias is None:
            self.bias = torch.zeros(B, g, room, device=self.k.device)
        bias = None if self.bias is None else self.bias[rows].gather(2, slots)
        if fold is not None and bias is not None:
            kept[0][:, :, fold.at], kept[1][:, :, fold.at], bias[:, :, fold.at] = fold.k, fold.v, fold.bias
        for row in range(*rows.indices(B)):
            self.lengths[row] = K
        most = max(self.lengths)
        if room > most + 4 * ROOM and room > 2 * most:
            # give the bytes back: a smaller tensor, not a shorter view
            old = self.k, self.v, self.pos
            self.k, self.v = (t.new_empty(B, g, most + ROOM, t.shape[3]) for t in old[:2])
            self.pos = old[2].new_full((B, g, most + ROOM), -1)
            for new, t in zip((self.k, self.v, self.pos), old, strict=True):
                new[:, :, :most] = t[:, :, :most]
            self.bias = None if self.bias is None else self.bias[:, :, : most + ROOM].clone()
        self.k[rows, :, :K], self.v[rows, :, :K], self.pos[rows, :, :K] = kept[0], kept[1], pos
        if self.bias is not None and bias is not None:
            self.bias[rows, :, :K] = bias

    def crop(self, removed: Sequence[int], seen: Sequence[int]) -> None:
        """Forget the last tokens of each row; `seen` is how many real tokens each row has then."""
        for row, count in enumerate(removed):
            if self.pos is None:
                self.lengths[row] -= count
            elif self.lengths[row]:
                # positions ascend within a row and all heads of a group keep equally many, but not the same ones
                alive = (self.pos[row, :, : self.lengths[row]] < seen[row]).sum(-1)
                if int(alive.min()) != int(alive.max()):
                    raise InputError(
                        "crop: the heads of an evicting cache disagree on how many recent tokens they hold"
                    )
                self.lengths[row] = int(alive[0])

    def select(self, index: Tensor) -> None:
        """Rows index [B'] of the batch become the batch (beams, repeats, selections)."""
        if self.k is None or self.v is None:
            return
        index = index.to(self.k.device)
        self.k, self.v = self.k.index_select(0, index), self.v.index_select(0, index)
        self.pos = None if self.pos is None else self.pos.index_select(0, index)
        self.bias = None if self.bias is None else self.bias.index_select(0, index)
        self.lengths = [self.lengths[i] for i in index.tolist()]

    def fork(self) -> Group:
        """The same, in tensors of its own."""
        other = Group(self.heads, self.policy)
        other.k, other.v, other.pos, other.bias = (
            None if t is None else t.clone() for t in (self.k, self.v, self.pos, self.bias)
        )
        other.lengths = list(self.lengths)
        return other

    def bytes(self) -> int:
        """Bytes in memory, room to grow included."""
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.pos, self.bias) if t is not None)

    def reserve(self, room: int) -> None:
        """Make room for so many slots more."""
        self._reserve(max(self.lengths) + room)

    def _allocate(self, B: int, g: int, room: int, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k.new_empty(B, g, room, k.shape[3]), v.new_empty(B, g, room, v.shape[3])

    def _reserve(self, needed: int) -> None:
        assert self.k is not None and self.v is not None
        B, g, room, _ = self.k.shape
        if needed <= room:
            return
        room, used = needed + needed // 8 + ROOM, max(self.lengths)
        old = self.k, self.v, self.pos
        self._allocate(B, g, room, self.k, self.v)
        self.k[:, :, :used], self.v[:, :, :used] = old[0][:, :, :used], old[1][:, :, :used]
        if old[2] is not None:
            self.pos = old[2].new_full((B, g, room), -1)
            self.pos[:, :, :used] = old[2][:, :, :used]
        if self.bias is not None:
            self.bias = torch.nn.functional.pad(self.bias, (0, room - self.bias.shape[2]))
