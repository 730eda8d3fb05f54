"""How the keys of a few queries are cut up for the decode kernel: patterns become windows and lists, these units.

Every pattern comes down to a window per head (`Full` is a window without end) and some lists of key blocks (a token is
a block of one). A unit is some query rows that read the same keys: the query heads of a key head where the lists allow
it, so that a key is read once for all of them. Its keys are numbered through, first the window's, then each list's, and
`splits` programs share them evenly. How many they are follows from shapes alone: nothing here waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core.call import Call, Shape, kv_heads
from saccade.core.pattern import Blocks, Full, Pattern, PerHead, Tokens, Union, Window, per_head

LISTS = 3  # index tensors in one launch
EVERYTHING = 1 << 30  # a window that ends nowhere


class Leaf(NamedTuple):
    """One plain pattern and the query heads that it is for; `share` of them use one row of an index per kv head."""

    heads: tuple[int, ...]
    pattern: Pattern
    share: int


class List(NamedTuple):
    """Key blocks for some heads: int [1|B, rows, lines, K], `height` queries per line; heads None means all."""

    entries: Tensor
    block: int
    height: int
    heads: tuple[int, ...] | None = None

    def row(self, head: int) -> int:
        """The row of a query head, -1 where it has none."""
        if self.heads is None or head not in self.heads:
            return -1
        return self.heads.index(head) // (len(self.heads) // self.entries.shape[1])


class Form(NamedTuple):
    """What all patterns come down to: sizes of windows, as ints where all heads are alike, and lists."""

    sink: int | Tensor | tuple[int, ...]
    recent: int | Tensor | tuple[int, ...]
    lists: tuple[List, ...]


class Tile(NamedTuple):
    """One step of a program: its keys, its query rows at most (more are several units), warps, steps under way.

    And how many programs a multiprocessor is given.
    """

    keys: int
    rows: int
    warps: int
    stages: int
    programs: int


class Table(NamedTuple):
    """Units that are not alike, int32 on the device.

    Shapes: work [programs, 2]: unit and split. units [units, 3 + lists + rows]: kv head, splits, first query, row in
    each list, then head * N + query of each row or -1. places [H*N, 3]: first program, splits, row in the unit. sinks,
    recents [H].
    """

    work: Tensor
    units: Tensor
    places: Tensor
    sinks: Tensor
    recents: Tensor


class Launch(NamedTuple):
    """A form cut into units and splits; heads and queries (0: all) of a unit count where there is no table."""

    sink: int
    recent: int
    lists: tuple[List, ...]
    window: bool
    heads: int
    queries: int
    rows: int
    tile: Tile
    splits: int  # of the unit that has most
    programs: int
    table: Table | None = None


def leaves(pattern: Pattern, heads: tuple[int, ...], share: int) -> Iterator[Leaf]:
    """The plain patterns that a pattern is made of."""
    if isinstance(pattern, Union):
        for part in pattern.parts:
            yield from leaves(part, heads, share)
    elif isinstance(pattern, PerHead):
        for local, part in pattern.parts:
            yield from leaves(part, tuple(heads[i] for i in local), len(local) // len(kv_heads(local, share)))
    else:
        yield Leaf(heads, pattern, share)


def refuses(pattern: Pattern, call: Call) -> str | None:
    """Why a pattern cannot be cut up; None where it can."""
    if isinstance(pattern, (Full, Window, Blocks, Tokens)):
        return None
    found = list(leaves(pattern, tuple(range(call.shape.H)), call.shape.H // call.shape.G))
    for leaf in found:
        if not isinstance(leaf.pattern, (Full, Window, Blocks, Tokens)):
            return f"the pattern {type(leaf.pattern).__name__}"
    lists = [set(leaf.heads) for leaf in found if isinstance(leaf.pattern, (Blocks, Tokens))]
    if len(lists) > LISTS:
        return f"{len(lists)} index tensors; one launch takes {LISTS}"
    for i, a in enumerate(lists):
        if any(a & b and not (a <= b or b <= a) for b in lists[:i]):
            return "a union of lists whose heads overlap in part"
    return None


def form_of(pattern: Pattern, call: Call) -> Form:
    """Windows and lists of a pattern; a pair that is in several is in one list only."""
    if isinstance(pattern, Full):
        return Form(0, EVERYTHING, ())
    if isinstance(pattern, (Blocks, Tokens)):
        return Form(0, 0, (_entries(pattern, call.shape.N),))
    if isinstance(pattern, Window) and isinstance(pattern.sink, int) and isinstance(pattern.recent, int):
        return Form(pattern.sink, pattern.recent, ())
    H = call.shape.H
    found = list(leaves(pattern, tuple(range(H)), H // call.shape.G))
    windows = [leaf for leaf in found if isinstance(leaf.pattern, (Full, Window))]
    full = {h for leaf in windows if isinstance(leaf.pattern, Full) for h in leaf.heads}
    # the widest first: what is counted in it is left out of the others
    listed = [leaf for leaf in found if isinstance(leaf.pattern, (Blocks, Tokens)) and not full.issuperset(leaf.heads)]
    listed.sort(key=lambda leaf: -len(leaf.heads))
    lists = tuple(_list(leaf, listed[:i], call, full) for i, leaf in enumerate(listed))
    sizes = [
        (leaf.pattern.sink, leaf.pattern.recent) if isinstance(leaf.pattern, Window) else (0, EVERYTHING)
        for leaf in windows
    ]
    sink, recent = (_largest(windows, [pair[i] for pair in sizes], H) for i in (0, 1))
    alike = all(leaf.heads == tuple(range(H)) for leaf in found)
    if alike and isinstance(sink, tuple) and isinstance(recent, tuple):
        return Form(sink[0], recent[0], lists)
    return Form(sink, recent, lists)


def cut(form: Form, call: Call, device: torch.device, tile: Tile) -> Launch:
    """Cut a form into units and splits."""
    B, H, G, N, M = call.shape
    sink, recent, lists = form
    if not (isinstance(sink, int) and isinstance(recent, int)):
        reach = [M] * H
        if isinstance(sink, tuple) and isinstance(recent, tuple):
            reach = [_reach(*pair, call) for pair in zip(sink, recent, strict=True)]
        return cut_mixed(form, call.shape, device, tile, reach)
    heads, queries, tiles = H // G, 0, -(-_reach(sink, recent, call) // tile.keys)
    for one in lists:
        _, rows, lines, K = one.entries.shape
        heads = heads if rows in (1, G) else 1
        queries = 1 if lines > 1 else queries
        tiles += -(-K * one.block // tile.keys)
    per_unit = heads * (queries or N)
    rows = min(tile.rows, power(per_unit))
    units = H * N // per_unit * -(-per_unit // rows)
    # all programs run at once, and none is without keys
    wanted = max(1, min(tiles, tile.programs * processors(device) // (units * B)))
    splits = -(-tiles // -(-tiles // wanted)) if tiles else 1
    return Launch(sink, recent, lists, recent > 0 or sink > 0, heads, queries, rows, tile, splits, units * splits)


def cut_mixed(form: Form, shape: Shape, device: torch.device, tile: Tile, reach: Sequence[int]) -> Launch:
    """As `cut` where heads differ; `reach` says how many keys of its window each head looks at."""
    B, H, G, N, _ = shape
    which, lengths = [], []
    for h in range(H):
        rows = tuple([one.row(h) for one in form.lists])
        long = reach[h] + sum(
            one.entries.shape[3] * one.block for one, row in zip(form.lists, rows, strict=True) if row >= 0
        )
        # lengths count in steps of an eighth, so that a growing store rarely needs a new table
        step = max(tile.keys, 1 << max(0, long.bit_length() - 4))
        which.append(rows)
        lengths.append(-(-long // step) * step)
    many = any(one.entries.shape[2] > 1 for one in form.lists)
    wanted = tile.programs * processors(device)
    splits, programs, rows_of, parts = _table(tuple(which), tuple(lengths), (B, H, G, N), many, tile, wanted, device)
    sizes = (x if isinstance(x, Tensor) else (x,) * H if isinstance(x, int) else x for x in form[:2])
    sinks, recents = (x.to(device, torch.int32) if isinstance(x, Tensor) else _ints(x, device) for x in sizes)
    table = Table(*parts, sinks, recents)
    return Launch(0, 0, form.lists, any(reach), 1, 0, rows_of, tile, splits, programs, table)


def power(n: int) -> int:
    """The power of two at or above n, 16 or more."""
    return 1 << max(4, (n - 1).bit_length())


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; few on a CPU, where programs run one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _reach(sink: int, recent: int, call: Call) -> int:
    """Slots that a window can make a unit look at, from shapes alone."""
    M, size = call.shape.M, sink + recent
    straight = call.contiguous or call.filled is not None
    return 0 if size == 0 else min(M, size + call.shape.N) if straight else M


def _largest(windows: Sequence[Leaf], sizes: Sequence[int | Tensor], H: int) -> Tensor | tuple[int, ...]:
    """The largest size of each head's windows: ints, or int32 [H] where one of them is known to the device only."""
    device = next((size.device for size in sizes if isinstance(size, Tensor)), None)
    found: Any = [0] * H if device is None else torch.zeros(H, dtype=torch.int32, device=device)
    for leaf, size in zip(windows, sizes, strict=True):
        for i, h in enumerate(leaf.heads):
            mine = size[min(i, len(size) - 1)].int() if isinstance(size, Tensor) else size
            found[h] = max(found[h], mine) if device is None else found[h].clamp(min=mine)
    return tuple(found) if device is None else found


def _entries(pattern: Blocks | Tokens, N: int, heads: tuple[int, ...] | None = None) -> List:
    """A pattern's index as a list."""
    index = pattern.index if pattern.index.is_contiguous() else pattern.index.contiguous()
    if isinstance(pattern, Blocks):
        return List(index, pattern.block_k, pattern.block_q if index.shape[2] > 1 else N, heads)
    return List(index, 1, 1 if index.shape[2] > 1 else N, heads)


def _list(leaf: Leaf, earlier: Sequence[Leaf], call: Call, full: set[int]) -> List:
    """A leaf's key blocks without those of earlier leaves, for heads that do not read everything anyway."""
    assert isinstance(leaf.pattern, (Blocks, Tokens))
    one = _entries(leaf.pattern, call.shape.N, leaf.heads)
    for other in earlier:
        if set(other.heads) & set(leaf.heads):
            one = _without(one, leaf, other, call)
    # a head that reads everything keeps its place, so that the others keep theirs
    return one._replace(heads=tuple(-1 if h in full else h for h in leaf.heads))


def _without(one: List, leaf: Leaf, other: Leaf, call: Call) -> List:
    """The tokens of a list that another leaf, for these heads or more, does not read."""
    M, N, device = call.shape.M, call.shape.N, one.entries.device
    mine, theirs = (call.take(each.heads, kv=len(each.heads) // each.share) for each in (leaf, other))
    there = other.pattern
    assert isinstance(there, (Blocks, Tokens))
    if leaf.heads != other.heads:
        # slices: an index made from a Python list would be copied to the device, which a capture forbids
        theirs_only = per_head(there.index, theirs).expand(-1, len(other.heads), -1, -1)
        picked = [theirs_only[:, i : i + 1] for i in map(other.heads.index, leaf.heads)]
        there = replace(there, index=torch.cat(picked, 1))
    single = one.entries.shape[2] == 1 and there.index.shape[2] == 1
    rows = torch.arange(1 if single else N, device=device)
    blocks = per_head(one.entries, mine).long()[:, :, rows // one.height]
    slots = (blocks[..., None] * one.block + torch.arange(one.block, device=device)).flatten(3)
    found = there.member(mine, rows, slots.clamp(0, M - 1)) | (slots < 0) | (slots >= M)
    return List(torch.where(found, -1, slots).int().contiguous(), 1, N if single else 1, one.heads)


# kept for good: a captured graph goes on reading them. They are few: one for each mixture and eighth of an octave.
@functools.cache
def _table(
    which: tuple[tuple[int, ...], ...],
    lengths: tuple[int, ...],
    shape: tuple[int, int, int, int],
    many: bool,
    tile: Tile,
    wanted: int,
    device: torch.device,
) -> tuple[int, int, int, tuple[Tensor, Tensor, Tensor]]:
    """Most splits of a unit, programs, rows of a unit, and the first three of a `Table`.

    Heads of a kv head that read the same rows of the lists are a unit; with `many` lines per list, for each query.
    """
    B, H, G, N = shape
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for h, mine in enumerate(which):
        groups.setdefault((h // (H // G), mine), []).append(h)
    rows = min(tile.rows, power(max(map(len, groups.values())) * (1 if many else N)))
    units = []
    for (g, mine), heads in groups.items():
        for queries in [[n] for n in range(N)] if many else [list(range(N))]:
            ids = [h * N + n for h in heads for n in queries]
            for a in range(0, len(ids), rows):
                units.append((g, queries[0], mine, ids[a : a + rows], max(lengths[h] for h in heads)))
    part = max(tile.keys, -(-sum(unit[-1] for unit in units) * B // wanted))
    work: list[tuple[int, ...]] = []
    lines, places = [], [(0, 0, 0)] * (H * N)
    for at, (g, query, mine, ids, length) in enumerate(units):
        splits = max(1, -(-length // part))
        for r, row in enumerate(ids):
            places[row] = len(work), splits, r
        work += [(at, split) for split in range(splits)]
        lines.append((g, splits, query, *mine, *ids, *[-1] * (rows - len(ids))))
    tensors = tuple(torch.tensor(t, dtype=torch.int32).to(device) for t in (work, lines, places))
    return max(line[1] for line in lines), len(work), rows, tensors  # type: ignore[return-value]


@functools.cache
def _ints(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device)
