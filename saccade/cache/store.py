"""The key-value store of one layer: what is kept really is all that is held.

Key heads that share a policy form a group, one rectangular tensor each (`saccade.cache.group`), so that "half the heads
keep 320 tokens" frees half the bytes. Rows of a batch are stored without their padding: slot 0 is a row's first real
token. Nothing here knows about Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.cache.group import Group, Keeper, View
from saccade.core.call import Call
from saccade.core.clock import Clock, lap
from saccade.core.errors import InputError
from saccade.core.lasting import lasting

DRAFT = 16  # so many tokens may be taken back after an eviction that saw them: a policy by recency keeps as many more


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
        self.scale: float | None = None  # of the layer's logits, for policies that look at them; None = 1/sqrt(D)
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
            self.memory = [rows_of(self.memory[0], torch.tensor([row])) for row in range(B)]

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
                fields = dict(scale=self.scale, memory=self.memory_of(rows))
                call = call_for(mine, view, self.seen[rows.start], tuple(heads), **fields)
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
                q[:, :, : max(0, q.shape[2] - removed[rows.start])]
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
            self.memory = [rows_of(self.memory[0], index)]
            self._asked = (
                None if self._asked is None else [self._asked[0].index_select(0, index.to(self._asked[0].device))]
            )
        else:
            self.memory = [rows_of(self.memory[i], torch.tensor([0])) for i in at]
            self._asked = None if self._asked is None else [self._asked[i] for i in at]
        self.seen, self._cut = [self.seen[i] for i in at], [self._cut[i] for i in at]
        self.valid = None if self.valid is None else self.valid.index_select(0, index.to(self.valid.device))

    @lasting
    def fork(self) -> Store:
        """A store that goes on from here by itself: keys, values, and what the methods and policies remember.

        Neither sees what is appended to the other. Blocks in a tier are shared: they are written once and only read.
        """
        other = Store(self.policies, self.kv_heads, self.shared)
        other.scale = self.scale
        other.groups = [group.fork() for group in self.groups]
        other.seen, other.total, other._cut = list(self.seen), self.total, list(self._cut)
        other.valid = self.valid
        # rows that stay together share one memory, else each row has its own
        rows = len(self.seen) if len(self.memory) == 1 else 1
        other.memory = [rows_of(held, torch.arange(rows)) for held in self.memory]
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


def rows_of(memory: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The memory of some rows: tensors are batch-first, dicts are searched, objects may have their own `select`."""
    picked: dict[str, Any] = {}
    for key, value in memory.items():
        if isinstance(value, Tensor) and value.ndim:
            picked[key] = value.index_select(0, index.to(value.device))
        elif isinstance(value, dict):
            picked[key] = rows_of(value, index)
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
