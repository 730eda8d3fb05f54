"""Graph: a graph over keys whose edges join what one query looks at together, and best-first search along it."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.errors import InputError
from saccade.kernels.search.api import Found, check_keys, check_search
from saccade.kernels.search.flat import nearest

SPREAD = 16  # keys of a list that take it for their own
TILE = 1 << 22  # numbers in the largest scratch tensor
NONE = float("-inf")


class Graph:
    """An attention-aware graph (RetrievalAttention, Liu et al. 2024, arXiv 2409.10516; its graph is RoarGraph's,
    Chen et al., VLDB 2024, arXiv 2408.08933, github.com/matchyc/RoarGraph).

    Queries of a head lie far from its keys, so neighbours among keys lead a query nowhere. Here edges are drawn by
    queries of the prompt: each has a list of the keys nearest to it, and keys that stand in many lists together become
    neighbours. A few edges join each key to keys that are near to itself, and more are added until all can be reached.
    The search starts at the keys that most queries look at, and opens the best key not yet opened until none is left
    in its queue.

    Args:
        degree: edges that a key has by common lists.
        near: edges that it has by nearness.
        lists: keys in the list of a training query.
        queue: keys that the search keeps in sight: more of them find more and scan more. At least the count asked for.
        entries: keys that a search starts from.
        width: keys that a search opens at a time: more are faster, and scan a little more.

    Departs from the paper: neighbours by how many lists they share, not by nearness to the first key of a list, since
        in attention many queries share that one; a list lends itself to 16 of its keys, evenly drawn. Pruning by
        occlusion serves the edges by nearness only; those are found exactly, not by a search.

    Example:
        >>> keys, queries = torch.randn(300, 8), torch.randn(100, 8)
        >>> graph = Graph(degree=8, lists=20, queue=300)
        >>> graph.build(keys, queries)
        >>> exact = (queries @ keys.T).topk(10).indices
        >>> bool((graph.search(queries, 10).ids == exact).all())
        True
    """

    def __init__(
        self, degree: int = 32, near: int = 8, lists: int = 100, queue: int = 128, entries: int = 16, width: int = 2
    ) -> None:
        for name, value, least in (
            *(("degree", degree, 1), ("near", near, 0), ("lists", lists, 1), ("queue", queue, 1)),
            *(("entries", entries, 1), ("width", width, 1)),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"graph: {name} must be an int >= {least}, got {value!r}")
        self.degree, self.near, self.lists, self.queue = degree, near, lists, queue
        self.entries, self.width = entries, width
        self.keys = torch.zeros(0, 0)
        self.edges = torch.zeros(0, 0, dtype=torch.int32)
        self.starts = torch.zeros(0, dtype=torch.long)

    def build(self, keys: Tensor, queries: Tensor | None = None) -> None:
        """Draw the graph; without queries the keys themselves are asked (the control: good for queries like keys)."""
        check_keys("graph", keys)
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        asked = keys if queries is None else queries.to(keys)
        if asked.ndim != 2 or asked.shape[1] != keys.shape[1] or not len(asked):
            raise InputError(f"graph: queries must be [m, {keys.shape[1]}] like the keys, got {list(asked.shape)}")
        n = len(keys)
        found = nearest(asked, keys, min(self.lists, n))
        drawn = _partners(found, n, self.degree)
        parts = [drawn]
        if self.near:
            close = nearest(keys, keys, min(3 * self.near + 1, n))
            close = close.masked_fill(close == torch.arange(n)[:, None], -1)
            parts.append(self._both_ways(keys, _pruned(keys, close, _scores(keys, close), self.near)))
        edges = _without_twins(torch.cat(parts, 1))
        counts = torch.bincount(found[:, : min(16, n)].flatten(), minlength=n)
        self.starts = counts.topk(min(self.entries, n)).indices
        self.edges = _reachable(keys, edges, self.starts).int()
        self.keys = keys

    def search(self, queries: Tensor, count: int) -> Found:
        """Best-first search, for all queries side by side."""
        check_search("graph", self.keys.shape[1], queries, count)
        size = max(1, TILE // max(len(self.keys), self.edges.shape[1] * self.width * self.keys.shape[1]))
        if not len(queries):
            return Found(torch.zeros(0, count, dtype=torch.long), 0.0)
        parts = [self._search(q, count) for q in queries.to(self.keys).split(size)]
        scanned = sum(float(part[1].sum()) for part in parts) / len(queries)
        return Found(torch.cat([part[0] for part in parts]), scanned)

    def bytes(self) -> int:
        """Bytes of keys and edges."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.edges, self.starts))

    def _search(self, q: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Ids [m,count] and keys scanned [m]."""
        m, n, size = len(q), len(self.keys), max(self.queue, count)
        seen = torch.zeros(m, n + 1, dtype=torch.bool)
        seen[:, n] = True  # the key that stands for no key
        seen[:, self.starts] = True
        ids = torch.full((m, size), n)
        score = torch.full((m, size), NONE, dtype=q.dtype)
        opened = torch.zeros(m, size, dtype=torch.bool)
        first = (q @ self.keys[self.starts].T).topk(min(size, len(self.starts)), -1)
        ids[:, : first.indices.shape[1]] = self.starts[first.indices]
        score[:, : first.values.shape[1]] = first.values
        scanned = torch.full((m,), len(self.starts))
        rows = torch.arange(m)
        while len(rows):
            mine = slice(None) if len(rows) == m else rows
            open_score = score[mine].masked_fill(opened[mine], NONE)
            best = open_score.topk(min(self.width, size), -1)
            live = ~best.values.isneginf()
            alive = live.any(-1)
            if not bool(alive.all()):
                # the others are done
                rows, mine = rows[alive], rows[alive]
                best_at, live = best.indices[alive], live[alive]
                if not len(rows):
                    break
            else:
                best_at = best.indices
            now = ids[mine]
            opened[mine] = opened[mine].scatter(1, best_at, True)
            parents = now.gather(1, best_at).masked_fill(~live, n)
            next_to = self._next_to(parents).flatten(1)
            next_to = next_to.sort(-1).values
            fresh = ~seen[mine].gather(1, next_to)
            fresh[:, 1:] &= next_to[:, 1:] != next_to[:, :-1]
            next_to = next_to.masked_fill(~fresh, n)
            seen[mine] = seen[mine].scatter(1, next_to, True)
            scanned[mine] += fresh.sum(-1)
            # most have been seen: what is new goes to the front
            most = max(1, int(fresh.sum(-1).max()))
            at = fresh.to(torch.int8).topk(most, -1).indices
            next_to, fresh = next_to.gather(1, at), fresh.gather(1, at)
            values = (self.keys[next_to.clamp_max(n - 1)] @ q[mine][:, :, None]).squeeze(-1).masked_fill(~fresh, NONE)
            joined = torch.cat((score[mine], values), 1).topk(size, -1)
            score[mine] = joined.values
            ids[mine] = torch.cat((now, next_to), 1).gather(1, joined.indices)
            old = torch.cat((opened[mine], torch.zeros_like(fresh)), 1)
            opened[mine] = old.gather(1, joined.indices)
        ids = ids[:, :count]
        ids = ids.masked_fill(score[:, :count].isneginf(), -1)
        return torch.nn.functional.pad(ids, (0, count - ids.shape[1]), value=-1), scanned

    def _next_to(self, parents: Tensor) -> Tensor:
        n = len(self.keys)
        edges = self.edges[parents.clamp_max(n - 1)].long()
        return edges.masked_fill((edges < 0) | (parents == n)[..., None], n)

    def _both_ways(self, keys: Tensor, edges: Tensor) -> Tensor:
        """The edges and their reverses, pruned again."""
        source = torch.arange(len(keys))[:, None].expand_as(edges)
        real = edges >= 0
        ends = torch.cat((source[real], edges[real])), torch.cat((edges[real], source[real]))
        return _pruned(keys, *_by_key(*ends, keys, 4 * self.near), self.near)


def _partners(found: Tensor, n: int, degree: int) -> Tensor:
    """The keys that stand in most lists [m,L] together with each key: [n,degree], -1 where there are fewer.

    Lists come in batches whose pairs are counted apart and then together, so that few pairs are held at a time.
    """
    L = found.shape[1]
    step = torch.linspace(0, L - 1, min(SPREAD, L)).round().long().unique()
    pairs, counts = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    for part in found.split(max(1, TILE // (len(step) * L))):
        left = part[:, step, None].expand(-1, -1, L).flatten()
        right = part[:, None, :].expand(-1, len(step), L).flatten()
        real = (left != right) & (left >= 0) & (right >= 0)
        new, count = (left[real] * n + right[real]).unique(return_counts=True)
        pairs, place = torch.cat((pairs, new)).unique(return_inverse=True)
        counts = torch.zeros(len(pairs), dtype=torch.long).index_add_(0, place, torch.cat((counts, count)))
    left, right = pairs // n, pairs % n
    return _table(left, right, counts, n, degree)[0]


def _by_key(left: Tensor, right: Tensor, keys: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The partners of each key, best first: ids [n,most] with -1, and their inner products with the key."""
    n = len(keys)
    pair = (left * n + right).unique()
    left, right = pair // n, pair % n
    size = TILE // keys.shape[1]
    score = torch.cat([(keys[a] * keys[b]).sum(-1) for a, b in zip(left.split(size), right.split(size), strict=True)])
    return _table(left, right, score, n, most)


def _table(left: Tensor, right: Tensor, score: Tensor, n: int, most: int) -> tuple[Tensor, Tensor]:
    """For each left [p] in 0..n-1 its rights with the largest scores, best first: ids [n,most] with -1, and scores."""
    order = score.argsort(descending=True, stable=True)
    order = order[left[order].argsort(stable=True)]
    left, right, score = left[order], right[order], score[order]
    rank = _rank(left, n)
    few = rank < most
    width = int(rank[few].max()) + 1 if len(left) else 1
    ids = torch.full((n, width), -1)
    scores = torch.full((n, width), NONE)
    ids[left[few], rank[few]], scores[left[few], rank[few]] = right[few], score[few].to(scores.dtype)
    return ids, scores


def _rank(groups: Tensor, n: int) -> Tensor:
    """The place of each entry in its group; the groups [p] ascend."""
    start = torch.bincount(groups, minlength=n).cumsum(0)
    return torch.arange(len(groups)) - (start - torch.bincount(groups, minlength=n))[groups]


def _scores(keys: Tensor, ids: Tensor) -> Tensor:
    """Inner products of each key with others ids [n,C]; -inf where there is none."""
    parts = []
    for at in torch.arange(len(keys)).split(max(1, TILE // (ids.shape[1] * keys.shape[1]))):
        mine = ids[at]
        parts.append((keys[mine.clamp_min(0)] @ keys[at][:, :, None]).squeeze(-1).masked_fill(mine < 0, NONE))
    return torch.cat(parts)


def _pruned(keys: Tensor, ids: Tensor, scores: Tensor, degree: int) -> Tensor:
    """The occlusion rule: a candidate is left out if one that is nearer to the key is nearer to the candidate, too.

    What is left over fills up to `degree`. ids [n,C] best first, -1 = none -> [n,min(degree,C)].
    """
    C, kept = ids.shape[1], []
    for part, score in zip(*(t.split(max(1, TILE // (C * max(C, keys.shape[1])))) for t in (ids, scores)), strict=True):
        order = score.argsort(-1, descending=True)
        part, score = part.gather(1, order), score.gather(1, order)
        those = keys[part.clamp_min(0)]
        between = those @ those.transpose(1, 2)
        hidden = part < 0
        taken = torch.zeros_like(hidden)
        for j in range(C):
            take = ~hidden[:, j] & (taken.sum(-1) < degree)
            taken[:, j] = take
            hidden = hidden | (take[:, None] & (between[:, j] > score))
        # those taken first, then the nearest of the others
        rank = taken.int() * 2 + (part >= 0).int()
        first = rank.argsort(dim=-1, descending=True, stable=True)[:, :degree]
        kept.append(part.gather(1, first))
    return torch.cat(kept)


def _without_twins(edges: Tensor) -> Tensor:
    """Each neighbour once; -1 at the end."""
    edges = edges.sort(-1, descending=True).values
    edges[:, 1:] = edges[:, 1:].masked_fill(edges[:, 1:] == edges[:, :-1], -1)
    edges = edges.sort(-1, descending=True).values
    return edges[:, : max(1, int((edges >= 0).sum(-1).max()))]


def _reachable(keys: Tensor, edges: Tensor, starts: Tensor) -> Tensor:
    """The edges, and as many more as it takes to come from the starts to every key."""
    n = len(keys)
    found = torch.zeros(n, dtype=torch.bool)
    front = starts
    extra: list[tuple[Tensor, Tensor]] = []
    while True:
        while len(front):
            found[front] = True
            after = edges[front].flatten()
            after = after[after >= 0].unique()
            front = after[~found[after]]
        lost = (~found).nonzero().flatten()
        if not len(lost):
            break
        # each lost key hangs on a key that is found; few at a time for one parent, so that no key becomes a hub
        known = found.nonzero().flatten()
        some = lost[: max(1, TILE // max(1, len(known)))]
        parent = known[nearest(keys[some], keys[known], 1)[:, 0]]
        order = parent.argsort(stable=True)
        rank = _rank(parent[order], n)
        # beyond four the lost keys hang on each other in a chain
        chained = torch.where(rank < 4, parent[order], some[order].roll(4))
        extra.append((chained, some[order]))
        front = some
    if not extra:
        return edges
    left, right = torch.cat([a for a, _ in extra]), torch.cat([b for _, b in extra])
    order = left.argsort(stable=True)
    left, right = left[order], right[order]
    rank = _rank(left, n)
    more = torch.full((n, int(rank.max()) + 1), -1)
    more[left, rank] = right
    # one lost key may have led to another already
    return _without_twins(torch.cat((edges, more), 1))
