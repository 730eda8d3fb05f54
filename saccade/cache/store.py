"""The key-value store of one layer: what is kept really is all that is held.

Key heads that share a policy form a group, one rectangular tensor each, so that "half the heads keep 320 tokens" frees
half the bytes. Rows of a batch are stored without their padding: slot 0 is a row's first real token. Appending is in
place; room grows by an eighth. Nothing here knows about Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.clock import Clock, lap
from saccade.core.errors import InputError
from saccade.core.lasting import lasting

ROOM = 64  # slots added beyond what is needed
DRAFT = 16  # so many tokens may be taken back after an eviction that saw them: a policy by recency keeps as many more


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


class Store:
    """The keys and values of one layer, and its methods' memory.

    Args:
        policies: (key heads, policy) pairs; heads named in none keep everything.
        kv_heads: key heads in the layer.
        shared: what the memory holds from the start, the same objects in all layers (`saccade.cache.cap`).

    Example:
        >>> store = Store([], kv_heads=2)
        >>> store.append(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
        >>> store.seen, store.views()[0].k.shape
        ([5], torch.Size([1, 2, 5, 4]))
    """

    def __init__(
        self,
        policies: Sequence[tuple[Sequence[int], Keeper]],
        kv_heads: int,
        shared: Mapping[str, Any] | None = None,
    ) -> None:
        self.kv_heads = kv_heads
        self.shared = {} if shared is None else dict(shared)
        self.policies = [(tuple(sorted(heads)), policy) for heads, policy in policies]
        self.reset()

    def reset(self) -> None:
        """Forget everything; the bytes are given back."""
        named = {h for heads, _ in self.policies for h in heads}
        rest = [h for h in range(self.kv_heads) if h not in named]
        self.groups = [Group(rest)] if rest else []
        self.groups += [Group(heads, policy) for heads, policy in self.policies]
        self.seen: list[int] = []  # real tokens per row
        self.total = 0  # tokens per row, padding included
        self.valid: Tensor | None = None  # [B, total], None while nothing was padding
        self.memory: list[dict[str, Any]] = []  # one for the whole batch, or one per row once rows differ in length
        self._asked: list[Tensor] | None = None  # queries of a short call, whose eviction waits for a crop
        self._cut: list[int] = []  # real tokens per row when something was last evicted

    @lasting
    def append(self, k: Tensor, v: Tensor, valid: Tensor | None = None) -> None:
        """Add tokens k [B,G,n,D], v [B,G,n,Dv]; valid [B,n] is False where a row is padded.

        Raises:
            InputError: another batch size or number of heads than before, or a row that is padding from end to end.
        """
        B, G, n, _ = k.shape
        if self.kv_heads != G:
            raise InputError(f"store: {G} key heads were given, the store has {self.kv_heads}")
        if self.seen and len(self.seen) != B:
            raise InputError(f"store: a batch of {B} rows was given, the store holds {len(self.seen)}; reset() it")
        valid = None if valid is None or bool(valid.all()) else valid
        added = [n] * B if valid is None else valid.sum(1).tolist()
        for row, more in enumerate(added):
            if more + (self.seen[row] if self.seen else 0) == 0:
                raise InputError(f"store: batch row {row} is padding from end to end; drop it")
        self.settle()
        if not self.seen:
            self.seen, self.memory, self._cut = [0] * B, [dict(self.shared)], [0] * B
        if valid is not None or self.valid is not None:
            past = torch.ones(B, self.total, dtype=torch.bool, device=k.device) if self.valid is None else self.valid
            here = torch.ones(B, n, dtype=torch.bool, device=k.device) if valid is None else valid
            self.valid = torch.cat((past, here), 1)
        for group in self.groups:
            heads = list(group.heads)
            mine = (k, v) if len(heads) == G else (k[:, heads], v[:, heads])
            group.append(*mine, valid, self.seen)
        self.seen = [a + b for a, b in zip(self.seen, added, strict=True)]
        self.total += n
        # rows stay together while they are equally long and padded in the same places
        alike = len(set(self.seen)) == 1 and (valid is None or bool((valid == valid[:1]).all()))
        if not alike and len(self.memory) == 1:
            self.memory = [_rows_of(self.memory[0], torch.tensor([row])) for row in range(B)]

    def extend(self, count: int) -> None:
        """Count `count` tokens more in every row, which were written into the groups' room (see `Fixed`)."""
        self.seen = [n + count for n in self.seen]
        self.total += count
        for group in self.groups:
            group.lengths = [n + count for n in group.lengths]
        if self.valid is not None:
            self.valid = torch.nn.functional.pad(self.valid, (0, count), value=True)

    def row_sets(self) -> list[slice]:
        """Slices of the batch whose rows are of equal length: one of all rows, or one for each row."""
        if len(self.memory) == 1:
            return [slice(0, len(self.seen))]
        return [slice(row, row + 1) for row in range(len(self.seen))]

    def views(self, rows: slice | None = None) -> list[View]:
        """What each group holds for a set of rows."""
        rows = self.row_sets()[0] if rows is None else rows
        held = [group.view(rows) for group in self.groups]
        # in a ragged batch one row may have lost tokens while another still has all of its own
        return [v._replace(pos=None, bias=None) if v.k.shape[2] == self.seen[rows.start] else v for v in held]

    def memory_of(self, rows: slice) -> dict[str, Any]:
        """The methods' memory for a set of rows."""
        return self.memory[0] if len(self.memory) == 1 else self.memory[rows.start]

    def asked(self, q: list[Tensor], now: bool, clock: Clock | None = None) -> None:
        """The queries that were just answered, one tensor [b,H,n,D] for each row set; policies may now evict.

        After a prefill (`now`) they evict at once, so that bytes are freed layer by layer. After a step they wait for
        the next call, so that a crop in between (rejected draft tokens) takes nothing away that should have stayed.
        """
        if any(group.policy is not None for group in self.groups):
            # those that wait may be read in another mode than the one that the model made them in
            self._asked = [lasting(torch.clone)(t) if t.is_inference() and not now else t for t in q]
            if now:
                self.settle(clock)

    @lasting
    def settle(self, clock: Clock | None = None) -> None:
        """Let the policies evict what the last call no longer needs."""
        if self._asked is None:
            return
        queries, self._asked = self._asked, None
        for rows, q in zip(self.row_sets(), queries, strict=True):
            for group in self.groups:
                if group.policy is None:
                    continue
                view = group.view(rows)
                share = q.shape[1] // self.kv_heads
                heads = [h * share + i for h in group.heads for i in range(share)]
                # a list as an index is a tensor that a GPU would be waited for
                mine = q if len(heads) == q.shape[1] else q[:, heads]
                call = call_for(mine, view, self.seen[rows.start], tuple(heads), memory=self.memory_of(rows))
                slots = group.policy.keep(mine, view.k, view.v, call)
                lap(clock, "select")
                if slots is not None and slots.shape[2] < view.k.shape[2]:
                    group.keep(rows, slots, group.policy.fold(view.k, view.v, view.bias, slots, call))
                    for row in range(*rows.indices(len(self.seen))):
                        self._cut[row] = max(self._cut[row], self.seen[row])
                    lap(clock, "copy")

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens of every row (padding counts as a token, as transformers counts it)."""
        if count <= 0 or not self.seen:
            return
        if count > self.total:
            raise InputError(f"crop: {count} tokens to remove, {self.total} are held")
        removed = [count] * len(self.seen) if self.valid is None else self.valid[:, -count:].sum(1).tolist()
        for seen, less, cut in zip(self.seen, removed, self._cut, strict=True):
            if cut and seen - less < cut - DRAFT:
                raise InputError(
                    f"crop: back to {seen - less} tokens, but tokens were evicted when there were {cut}; "
                    f"at most {DRAFT} of them can be taken back (draft fewer tokens, or start again)"
                )
        self.total -= count
        self.valid = None if self.valid is None else self.valid[:, : self.total]
        self.seen = [a - b for a, b in zip(self.seen, removed, strict=True)]
        for group in self.groups:
            group.crop(removed, self.seen)
        if self._asked is not None:
            left = [
                q[:, :, : q.shape[2] - removed[rows.start]]
                for rows, q in zip(self.row_sets(), self._asked, strict=True)
            ]
            self._asked = left if all(q.shape[2] for q in left) else None

    @lasting
    def select(self, index: Tensor) -> None:
        """Rows index [B'] of the batch become the batch: beam reordering, repeats, selections."""
        if not self.seen:
            return
        at = index.tolist()
        for group in self.groups:
            group.select(index)
        if len(self.memory) == 1:
            self.memory = [_rows_of(self.memory[0], index)]
            self._asked = (
                None if self._asked is None else [self._asked[0].index_select(0, index.to(self._asked[0].device))]
            )
        else:
            self.memory = [_rows_of(self.memory[i], torch.tensor([0])) for i in at]
            self._asked = None if self._asked is None else [self._asked[i] for i in at]
        self.seen, self._cut = [self.seen[i] for i in at], [self._cut[i] for i in at]
        self.valid = None if self.valid is None else self.valid.index_select(0, index.to(self.valid.device))

    @lasting
    def fork(self) -> Store:
        """A store that goes on from here by itself: keys, values, and what the methods and policies remember.

        Neither sees what is appended to the other. Blocks in a tier are shared: they are written once and only read.
        """
        other = Store(self.policies, self.kv_heads, self.shared)
        other.groups = [group.fork() for group in self.groups]
        other.seen, other.total, other._cut = list(self.seen), self.total, list(self._cut)
        other.valid = self.valid
        # rows that stay together share one memory, else each row has its own
        rows = len(self.seen) if len(self.memory) == 1 else 1
        other.memory = [_rows_of(held, torch.arange(rows)) for held in self.memory]
        other._asked = None if self._asked is None else list(self._asked)
        return other

    def bytes(self) -> int:
        """Bytes of keys, values, positions and biases in memory, room to grow included."""
        return sum(group.bytes() for group in self.groups)

    def state_bytes(self) -> int:
        """Bytes that the methods' memory holds beside the keys and values: summaries, indices, reused choices."""
        return _bytes_of(self.memory)


def call_for(q: Tensor, view: View, seen: int, heads: tuple[int, ...], **fields: Any) -> Call:
    """The call of queries at the end of what a view holds, after `seen` real tokens."""
    if view.pos is None:
        return Call.of(q, view.k, heads=heads, **fields)
    q_pos = torch.arange(seen - q.shape[2], seen, device=q.device)[None]
    return Call.of(q, view.k, heads=heads, q_pos=q_pos, k_pos=view.pos, **fields)


def _rows_of(memory: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The memory of some rows: tensors are batch-first, dicts are searched, objects may have their own `select`."""
    picked: dict[str, Any] = {}
    for key, value in memory.items():
        if isinstance(value, Tensor) and value.ndim:
            picked[key] = value.index_select(0, index.to(value.device))
        elif isinstance(value, dict):
            picked[key] = _rows_of(value, index)
        elif hasattr(value, "select"):
            picked[key] = value.select(index)
        else:
            picked[key] = value
    return picked


def _bytes_of(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists; an object may have a `bytes` of its own."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes_of(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes_of(item) for item in value)
    return int(value.bytes()) if callable(getattr(value, "bytes", None)) else 0
