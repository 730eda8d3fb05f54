"""Pattern: where each query looks, as data. Full, Window, Blocks, Tokens, Union and PerHead; Groups beside them.

The law of the library: `attend(q, k, v, pattern)` equals dense softmax attention under `pattern.mask(call)`.
Slots count places in the key store, positions count tokens of the sequence; they differ when a cache has evicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from saccade.core.call import Call, kv_heads
from saccade.core.errors import InputError

CHUNK = 1 << 24  # mask entries looked at in one go when pairs are counted the slow way


class Pattern:
    """A set of (query, key) pairs. Causality and padding are the call's business and always apply on top."""

    fields_per_head: ClassVar[tuple[str, ...]] = ()

    def member(self, call: Call, rows: Tensor, slots: Tensor) -> Tensor:
        """Is slot in the set for the row? rows [n], slots [1|B, 1|H, 1|n, S] -> bool that broadcasts to [B,H,n,S]."""
        raise NotImplementedError(f"{type(self).__name__} must implement member")

    def mask(self, call: Call, rows: Tensor | None = None) -> Tensor:
        """The pairs as booleans [B, H, N, M] (or [B, H, len(rows), M]), with causality and padding."""
        B, H, _, N, M = call.shape
        device = self._place(call) if rows is None else rows.device
        q_pos, k_pos = call.positions(device)
        rows = torch.arange(N, device=device) if rows is None else rows
        slots = torch.arange(M, device=device)[None, None, None]
        seen = call.sees(q_pos[:, None, rows, None], per_head(k_pos, call)[:, :, None, :])
        return (self.member(call, rows, slots) & seen).expand(B, H, len(rows), M)

    def counts(self, call: Call) -> Tensor:
        """How many (query, key) pairs each query head visits, over all rows: float64 [H], where the index lies.

        The host waits for nothing here, so that a model can be watched as it runs.
        """
        return self._count(call)

    def pairs(self, call: Call) -> float:
        """How many (query, key) pairs are visited, over all rows and heads."""
        return float(self.counts(call).sum())

    def density(self, call: Call) -> float:
        """Visited pairs as a share of all that the call allows: 1.0 is dense attention."""
        return self.pairs(call) / max(Full().pairs(call), 1.0)

    def heads(self, ids: Sequence[int], call: Call | None = None) -> Pattern:
        """The same pattern for some of the query heads; an index per kv head needs the call that it was made for."""
        changed = {}
        for name in self.fields_per_head:
            value = getattr(self, name)
            axis = 0 if isinstance(value, Tensor) and value.ndim == 1 else 1
            if isinstance(value, Tensor) and value.shape[axis] > 1:
                value = per_head(value, call) if call is not None and axis else value
                if max(ids) >= value.shape[axis]:
                    raise InputError(f"heads {list(ids)} of a pattern for {value.shape[axis]} heads; give its call")
                changed[name] = value.index_select(axis, torch.as_tensor(list(ids), device=value.device))
        return type(self)(**{**self.__dict__, **changed}) if changed else self

    def check(self, call: Call) -> None:
        """Raise InputError unless the pattern fits the call; the values of an index are looked at on a CPU only."""

    def draw(self, call: Call, size: int = 48) -> Tensor:
        """A picture [H, size, size]: the share of each cell's pairs that is visited (rows are sampled, 4 to a cell)."""
        B, H, _, N, M = call.shape
        size = min(size, N, M)
        rows = torch.linspace(0, N - 1, min(N, 4 * size), device=self._place(call)).round().long()
        mask = self.mask(call, rows)[0].float()
        return torch.nn.functional.adaptive_avg_pool2d(mask[None], (size, size))[0]

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        found = [v for v in self.__dict__.values() if isinstance(v, Tensor)]
        return found[0].device if found else torch.device("cpu")

    def _place(self, call: Call) -> torch.device:
        """Where pairs with this call are worked out: a pattern without tensors goes where the call's positions are."""
        given = call.k_pos if call.k_pos is not None else call.q_pos
        return self.device if given is None else given.device

    def _count(self, call: Call) -> Tensor:
        """`counts` of any pattern in any call: by its mask, a stretch of rows at a time."""
        B, H, _, N, M = call.shape
        step = max(1, CHUNK // (B * H * M))
        rows = torch.arange(N, device=self._place(call))
        found = [self.mask(call, rows[i : i + step]).sum((0, 2, 3)) for i in range(0, N, step)]
        return torch.stack(found).sum(0).double()


@dataclass(frozen=True)
class Full(Pattern):
    """Every key that causality allows."""

    def member(self, call: Call, rows: Tensor, slots: Tensor) -> Tensor:
        return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=slots.device)

    def counts(self, call: Call) -> Tensor:
        if not call.contiguous:
            return self._count(call)
        # on the CPU: nothing has to be asked
        return torch.full((call.shape.H,), self.pairs(call) / call.shape.H, dtype=torch.double)

    def pairs(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        if not call.contiguous:
            return super().pairs(call)
        return float(B * H * (N * call.offset + N * (N + 1) // 2 if call.causal else N * M))


@dataclass(frozen=True)
class Window(Pattern):
    """The first `sink` positions and the last `recent` up to the query itself (A-shape).

    Args:
        sink: positions from the start; an int, or integers [H].
        recent: positions that end at the query, itself included; an int >= 1, or integers [H].
    """

    sink: int | Tensor
    recent: int | Tensor
    fields_per_head: ClassVar[tuple[str, ...]] = ("sink", "recent")

    def __post_init__(self) -> None:
        for name in ("sink", "recent"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if value.ndim != 1:
                    raise InputError(f"Window: {name} must be an int or [heads], got shape {list(value.shape)}")
            elif value < (0 if name == "sink" else 1):
                raise InputError(f"Window: {name} must be >= {0 if name == 'sink' else 1}, got {value}")

    def check(self, call: Call) -> None:
        for name in ("sink", "recent"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and len(value) not in {1, call.shape.H}:
                raise InputError(f"Window: {name} is for {len(value)} heads, the call has {call.shape.H}")

    def member(self, call: Call, rows: Tensor, slots: Tensor) -> Tensor:
        q_pos, k_pos = call.positions(slots.device)
        p = q_pos[:, None, rows, None]
        j = slots if call.k_pos is None else at_slots(per_head(k_pos, call), slots)
        sink, recent = self._column("sink"), self._column("recent")
        return (j < sink) | ((p - j).abs() < recent)

    def counts(self, call: Call) -> Tensor:
        if not (call.contiguous and call.causal):
            return self._count(call)
        seen = torch.arange(call.offset, call.shape.M, device=self.device)[None] + 1
        # a column [H, 1] or a number
        sink, recent = (x[:, None] if isinstance(x, Tensor) else x for x in (self.sink, self.recent))
        far = (seen - recent).clamp(min=0).clamp(max=sink)
        return _of_heads((seen.clamp(max=recent) + far)[None], call)

    def _column(self, name: str) -> Any:
        value = getattr(self, name)
        return value[None, :, None, None] if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Blocks(Pattern):
    """Key blocks per query block, as compact lists.

    Args:
        index: int32 [B|1, H|G|1, ceil(N/block_q), K], the key blocks (slot // block_k) each query block reads;
            -1 = empty, distinct within a row, the empty ones last.
        block_q: rows in a query block, counted from the call's first query.
        block_k: slots in a key block.
    """

    index: Tensor
    block_q: int
    block_k: int
    fields_per_head: ClassVar[tuple[str, ...]] = ("index",)

    def __post_init__(self) -> None:
        if self.index.ndim != 4 or self.block_q < 1 or self.block_k < 1:
            raise InputError(
                f"Blocks: index must be [B, H, query blocks, K] and blocks >= 1, got {list(self.index.shape)}, "
                f"block_q {self.block_q}, block_k {self.block_k}"
            )

    def check(self, call: Call) -> None:
        lines, blocks = -(-call.shape.N // self.block_q), -(-call.shape.M // self.block_k)
        _check_index("Blocks", self.index, call, {lines}, blocks)

    def table(self, call: Call) -> Tensor:
        """Booleans [B|1, H|1, query blocks, key blocks]."""
        index = per_head(self.index, call).long()
        count = -(-call.shape.M // self.block_k)
        table = torch.zeros((*index.shape[:3], count + 1), dtype=torch.bool, device=index.device)
        # empty entries land in one column too many, which is cut off
        return table.scatter_(3, torch.where(index < 0, count, index), True)[..., :count]

    def member(self, call: Call, rows: Tensor, slots: Tensor) -> Tensor:
        table = self.table(call)[:, :, rows // self.block_q]
        if slots.shape[:3] == (1, 1, 1):
            return table[..., slots.reshape(-1) // self.block_k]
        shape = torch.broadcast_shapes((*table.shape[:3], 1), slots.shape)
        return table.expand(*shape[:3], table.shape[3]).gather(3, (slots // self.block_k).expand(shape))

    def counts(self, call: Call) -> Tensor:
        M = call.shape.M
        if not (call.contiguous and call.causal):
            return self._count(call)
        index = per_head(self.index, call).long()
        first, rows = self._rows(call)
        start = index * self.block_k
        width = (M - start).clamp(max=self.block_k)
        # row i of a query block sees clamp(first + i - start + 1, 0, width) keys of the block: a sum in closed form
        a = first[:, None] - start + 1
        total = (_ramp(a + rows[:, None] - 1, width) - _ramp(a - 1, width)) * (index >= 0)
        return _of_heads(total, call)

    def _rows(self, call: Call) -> tuple[Tensor, Tensor]:
        """First position and number of rows of each query block, [query blocks] each."""
        block = torch.arange(self.index.shape[2], device=self.index.device) * self.block_q
        return block + call.offset, (call.shape.N - block).clamp(max=self.block_q)

    def to_block_mask(self, call: Call) -> Any:
        """The same pattern as a FlexAttention BlockMask (block_q and block_k must divide the lengths).

        Blocks that every row sees whole go on the list for which FlexAttention asks no mask function.
        """
        from torch.nn.attention.flex_attention import BlockMask

        B, H, _, N, M = call.shape
        index = per_head(self.index, call).expand(B, H, -1, -1).int()
        offset, causal = call.offset, call.causal
        first = self._rows(call)[0][:, None]
        whole = (index >= 0) & ((index + 1) * self.block_k <= (first + 1 if causal else M))
        width = -(-M // self.block_k)

        def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
            line = torch.where(chosen, index, width).sort(-1).values
            line = torch.nn.functional.pad(line, (0, max(0, width - line.shape[3])), value=width)[..., :width]
            return chosen.sum(-1).int(), torch.where(line == width, 0, line).int()

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return j <= i + offset if causal else j >= 0

        return BlockMask.from_kv_blocks(
            *listed((index >= 0) & ~whole),
            *listed(whole),
            BLOCK_SIZE=(self.block_q, self.block_k),
            mask_mod=visible,
            seq_lengths=(N, M),
        )

    @classmethod
    def from_block_mask(cls, mask: Any) -> Blocks:
        """Blocks from a FlexAttention BlockMask (its partial and its full blocks; its mask_mod must be causality)."""
        pieces = []
        for count, index in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
            if count is not None:
                at = torch.arange(index.shape[-1], device=index.device)
                pieces.append(torch.where(at < count[..., None], index, -1))
        index = torch.cat(pieces, -1)
        index = torch.where(index < 0, torch.iinfo(torch.int32).max, index).sort(-1).values
        block_q, block_k = mask.BLOCK_SIZE
        return cls(torch.where(index == torch.iinfo(torch.int32).max, -1, index).int(), block_q, block_k)


@dataclass(frozen=True)
class Tokens(Pattern):
    """Single slots of the key store.

    Args:
        index: int32 [B|1, H|G|1, N|1, K] slots, distinct within a row, -1 = empty; one row serves all queries.
    """

    index: Tensor
    fields_per_head: ClassVar[tuple[str, ...]] = ("index",)

    def __post_init__(self) -> None:
        if self.index.ndim != 4:
            raise InputError(f"Tokens: index must be [B, H, N|1, K], got {list(self.index.shape)}")

    def check(self, call: Call) -> None:
        _check_index("Tokens", self.index, call, {1, call.shape.N}, call.shape.M)

    def member(self, call: Call, rows: Tensor, slots: Tensor) -> Tensor:
        index = per_head(self.index, call).long()
        index = index[:, :, rows] if index.shape[2] > 1 else index
        table = torch.zeros((*index.shape[:3], call.shape.M + 1), dtype=torch.bool, device=index.device)
        table = table.scatter_(3, torch.where(index < 0, call.shape.M, index), True)[..., : call.shape.M]
        shape = torch.broadcast_shapes((*table.shape[:3], 1), slots.shape)
        return table.expand(*shape[:3], table.shape[3]).gather(3, slots.expand(shape))

    def counts(self, call: Call) -> Tensor:
        M = call.shape.M
        if not (call.contiguous and call.causal):
            return self._count(call)
        index = per_head(self.index, call).long()
        if index.shape[2] == 1:
            seen = torch.where(index >= 0, M - index.clamp_min(call.offset), 0)
        else:
            seen = (index >= 0) & (index <= torch.arange(call.offset, M, device=index.device)[:, None])
        return _of_heads(seen, call)


@dataclass(frozen=True)
class Union(Pattern):
    """The union of patterns; a pair in several of them counts once."""

    parts: tuple[Pattern, ...]

    def member(self, call: Call, rows: Tensor, slots: Tensor) -> Tensor:
        found = self.parts[0].member(call, rows, slots)
        for part in self.parts[1:]:
            found = found | part.member(call, rows, slots)
        return found

    def check(self, call: Call) -> None:
        for part in self.parts:
            part.check(call)

    def heads(self, ids: Sequence[int], call: Call | None = None) -> Pattern:
        return Union(tuple(part.heads(ids, call) for part in self.parts))

    def counts(self, call: Call) -> Tensor:
        if call.contiguous and call.causal and len(self.parts) == 2:
            shared = _overlap(*self.parts, call)
            if shared is not None:
                return sum((_to(part.counts(call), shared.device) for part in self.parts), -shared)
        return self._count(call)

    @property
    def device(self) -> torch.device:
        found = [p.device for p in self.parts]
        return next((d for d in found if d.type != "cpu"), found[0])


@dataclass(frozen=True)
class PerHead(Pattern):
    """Different patterns for different query heads of one call, so that one launch serves a layer.

    Args:
        parts: (head ids, pattern) pairs; each pattern is for its own heads in that order, whose key heads are
            `kv_heads(ids, share)`; every head exactly once.
    """

    parts: tuple[tuple[tuple[int, ...], Pattern], ...]

    def __post_init__(self) -> None:
        ids = sorted(h for heads, _ in self.parts for h in heads)
        if ids != list(range(len(ids))):
            raise InputError(f"PerHead: every head must be named once, got {ids}")

    def member(self, call: Call, rows: Tensor, slots: Tensor) -> Tensor:
        shape = (len(rows), slots.shape[-1])
        found: dict[int, Tensor] = {}
        for heads, pattern in self.parts:
            mine = slots if slots.shape[1] == 1 else slots[:, list(heads)]
            part = pattern.member(_for_heads(call, heads), rows, mine).expand(call.shape.B, len(heads), *shape)
            found.update(zip(heads, part.unbind(1), strict=True))
        return torch.stack([found[head] for head in sorted(found)], 1)

    def counts(self, call: Call) -> Tensor:
        place = self._place(call)
        found: dict[int, Tensor] = {}
        for heads, pattern in self.parts:
            part = _to(pattern.counts(_for_heads(call, heads)), place)
            found.update(zip(heads, part.unbind(), strict=True))
        return torch.stack([found[head] for head in sorted(found)])

    def check(self, call: Call) -> None:
        named = sum(len(heads) for heads, _ in self.parts)
        if named != call.shape.H:
            raise InputError(f"PerHead: {named} heads are named, the call has {call.shape.H}")
        for heads, pattern in self.parts:
            pattern.check(_for_heads(call, heads))

    def heads(self, ids: Sequence[int], call: Call | None = None) -> Pattern:
        where = {h: new for new, h in enumerate(ids)}
        parts = []
        for heads, pattern in self.parts:
            local = [i for i, h in enumerate(heads) if h in where]
            if local:
                sub = None if call is None else _for_heads(call, heads)
                parts.append((tuple(where[heads[i]] for i in local), pattern.heads(local, sub)))
        return PerHead(tuple(parts))

    @property
    def device(self) -> torch.device:
        found = [p.device for _, p in self.parts]
        return next((d for d in found if d.type != "cpu"), found[0])


@dataclass(frozen=True)
class Groups:
    """Gathered clusters: queries q_index[c] attend keys k_index[c]. Not a mask: a query may be in none or in many.

    Args:
        q_index: int [B, H, C, W] rows of q, ascending.
        k_index: int [B, H, C, W2] slots of k, ascending.
    """

    q_index: Tensor
    k_index: Tensor


def per_head(t: Tensor, call: Call) -> Tensor:
    """Bring axis 1 from kv heads to query heads; a size of 1 stays, as it broadcasts."""
    H, G = call.shape.H, call.shape.G
    if t.shape[1] in {1, H}:
        return t
    if t.shape[1] == G:
        return t.repeat_interleave(H // G, dim=1)
    raise InputError(f"a head axis of {t.shape[1]} fits neither 1, {G} kv heads nor {H} query heads")


def at_slots(k_pos: Tensor, slots: Tensor) -> Tensor:
    """Positions k_pos [1|B, 1|H, M] of slots [1|B, 1|H, 1|n, S]."""
    if slots.shape[:3] == (1, 1, 1):
        return k_pos[:, :, slots.reshape(-1)][:, :, None, :]
    shape = torch.broadcast_shapes((*k_pos.shape[:2], 1, 1), slots.shape)
    return k_pos[:, :, None].expand(*shape[:3], -1).gather(3, slots.expand(shape))


def _for_heads(call: Call, heads: Sequence[int]) -> Call:
    """The call for some query heads."""
    return call.take(tuple(heads), kv_heads(heads, call.shape.H // call.shape.G))


def _check_index(name: str, index: Tensor, call: Call, lines: set[int], high: int) -> None:
    """Raise InputError unless an index [1|B, 1|G|H, lines, K] fits the call and lies in [-1, high)."""
    B, H, G, _, _ = call.shape
    shape = index.shape
    if shape[0] not in {1, B} or shape[1] not in {1, G, H} or shape[2] not in lines or shape[3] == 0:
        rows = "|".join(map(str, sorted(lines)))
        raise InputError(f"{name}: index must be [1|{B}, 1|{G}|{H}, {rows}, K >= 1] for this call, got {list(shape)}")
    if index.device.type == "cpu" and not (index.min() >= -1 and index.max() < high):
        raise InputError(f"{name}: index must be in [-1, {high}), got {index.min().item()} to {index.max().item()}")


def _of_heads(pairs: Tensor, call: Call) -> Tensor:
    """Sums of pairs [1|B, 1|H, ...] by query head: float64 [H]."""
    B, H = call.shape[:2]
    return pairs.flatten(2).sum((0, 2)).double().mul(B // pairs.shape[0]).expand(H)


def _to(counts: Tensor, device: torch.device) -> Tensor:
    # to a GPU without a wait: the driver sets a few numbers aside before it returns
    return counts.to(device, non_blocking=device.type != "cpu")


def _ramp(t: Tensor, width: Tensor) -> Tensor:
    """Sum of clamp(u, 0, width) over all integers u <= t."""
    low = t.clamp_min(0).minimum(width)
    return low * (low + 1) // 2 + (t - width).clamp_min(0) * width


def _overlap(a: Pattern, b: Pattern, call: Call) -> Tensor | None:
    """Pairs in both, float64 [H], in closed form where one is known; None elsewhere."""
    if isinstance(b, Blocks):
        a, b = b, a
    if not isinstance(a, Blocks):
        return None
    M = call.shape.M
    first, rows = a._rows(call)
    if isinstance(b, Tokens) and b.index.shape[2] == 1:
        slots = per_head(b.index, call).long()
        table = a.table(call)
        shape = (max(table.shape[0], slots.shape[0]), max(table.shape[1], slots.shape[1]), table.shape[2])
        at = (slots.clamp_min(0) // a.block_k).expand(*shape, -1)
        inside = table.expand(*shape, -1).gather(3, at) & (slots >= 0)
        # rows of the query block at or after the token
        below = rows[:, None] - (slots - first[:, None]).clamp_min(0).minimum(rows[:, None])
        return _of_heads(inside * below, call)
    if isinstance(b, Window) and not isinstance(b.sink, Tensor) and not isinstance(b.recent, Tensor):
        index = per_head(a.index, call).long()
        p = (first[:, None] + torch.arange(a.block_q, device=index.device))[:, None, :]
        p = torch.where(p < M, p, -1)
        lo = (index * a.block_k)[..., None]
        hi = torch.minimum((lo + a.block_k).clamp(max=M), p + 1)
        near = (hi - torch.maximum(lo, p - b.recent + 1)).clamp_min(0)
        far = (hi.minimum(p - b.recent + 1).clamp(max=b.sink) - lo).clamp_min(0)
        return _of_heads((near + far) * (index >= 0)[..., None] * (p >= 0), call)
    return None
