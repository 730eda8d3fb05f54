"""Lists: keys in small clusters, made stretch by stretch of the text; a query scans those that answer it best."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.errors import InputError
from saccade.kernels.search.api import Found, check_keys, check_search
from saccade.kernels.search.flat import nearest

TOGETHER = 16  # queries that are searched side by side
LIST = 64  # keys that a query of the prompt wants
FINE, COARSE, MANY = 16, 64, 1 << 18  # keys of a cluster, of few keys and of many


class Lists:
    """Inverted lists over stretches (the index of RetroInfer, Chen et al. 2025, arXiv 2505.02922, successor of
    RetrievalAttention; github.com/microsoft/RetrievalAttention).

    Keys that are near to each other in the text are often near as vectors. So each stretch of keys is clustered by
    itself (k-means, started from evenly spaced keys), which costs a fixed amount for each key: a million keys take
    seconds where the graph, whose building compares all keys with each other, takes hours. A query is multiplied with
    all centroids, and with the keys of the clusters whose centroids answer best. A single key that every query looks at
    hardly moves the centroid of its cluster: the keys that queries of the prompt want most are a list of their own,
    which is always scanned.

    Args:
        each: keys of a cluster, on average. None: 16, and 64 from 2^18 keys on, where small clusters take minutes to
            build.
        probes: clusters that a query scans.
        stretch: keys that are clustered together.
        rounds: of k-means.
        asked: queries of the prompt whose best keys are looked up, exactly.
        wanted: keys on the list that is always scanned: those that most of these queries have among their best 64.

    Departs from the paper: stretches of 4096 keys (there 8192), and clusters of 64 where keys are many (there 16);
        clusters that are not scanned count for nothing (there they are estimated by their centroids); k-means by
        distance; the list of wanted keys, RetrievalAttention's thought that the prompt's queries know what will be
        asked.

    Example:
        >>> keys = torch.randn(500, 8)
        >>> lists = Lists(each=10, probes=50)
        >>> lists.build(keys)
        >>> lists.search(keys[:2], 3).ids.shape
        torch.Size([2, 3])
    """

    def __init__(
        self, each: int | None = None, probes: int = 96, stretch: int = 4096, rounds: int = 3,
        asked: int = 128, wanted: int = 1024,
    ) -> None:  # fmt: skip
        for name, value in (
            *(("each", 1 if each is None else each), ("probes", probes), ("stretch", stretch), ("rounds", rounds)),
            *(("asked", asked), ("wanted", wanted)),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"lists: {name} must be an int >= 1, got {value!r}")
        self.each, self.probes, self.stretch, self.rounds = each, probes, stretch, rounds
        self.asked, self.wanted = asked, wanted
        self.keys = torch.zeros(0, 0)  # by cluster
        self.ids = torch.zeros(0, dtype=torch.int32)  # which key stands where
        self.centroids = torch.zeros(0, 0)
        self.starts = torch.zeros(2, dtype=torch.long)  # of each cluster, of the list of wanted keys, and the end

    def build(self, keys: Tensor, queries: Tensor | None = None) -> None:
        """Cluster the keys; queries say which of them are wanted always."""
        check_keys("lists", keys)
        owners, centroids, first = [], [], 0
        each = self.each or (FINE if len(keys) < MANY else COARSE)
        for part in keys.split(self.stretch):
            own, mean = _clustered(part.to(torch.promote_types(part.dtype, torch.float32)), each, self.rounds)
            owners.append(own + first)
            centroids.append(mean)
            first += len(mean)
        owner = torch.cat(owners)
        if queries is not None and len(queries):
            some = queries[torch.linspace(0, len(queries) - 1, min(self.asked, len(queries))).round().long()]
            counts = torch.bincount(nearest(some, keys, min(LIST, len(keys))).flatten(), minlength=len(keys))
            best = counts.topk(min(self.wanted, len(keys)))
            owner[best.indices[best.values > 0]] = first
        order = owner.argsort(stable=True)
        self.keys, self.ids, self.centroids = keys[order], order.int(), torch.cat(centroids)
        sizes = torch.bincount(owner, minlength=first + 1)
        self.starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))

    def search(self, queries: Tensor, count: int) -> Found:
        """The largest inner products among the keys of the best clusters."""
        check_search("lists", self.keys.shape[1] if len(self.keys) else 0, queries, count)
        if not len(queries):
            return Found(torch.zeros(0, count, dtype=torch.long), 0.0)
        parts = [self._search(part, count) for part in queries.to(self.centroids.dtype).split(TOGETHER)]
        scanned = sum(part[1] for part in parts) / len(queries) + len(self.centroids)
        return Found(torch.cat([part[0] for part in parts]), scanned)

    def bytes(self) -> int:
        """Bytes of keys, centroids and numbers."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.ids, self.centroids, self.starts))

    def _search(self, q: Tensor, count: int) -> tuple[Tensor, float]:
        """Ids [m,count], and the keys that were scanned, for each query its own clusters."""
        m, probes = len(q), min(self.probes, len(self.centroids))
        mine = (q @ self.centroids.T).topk(probes, -1, sorted=False).indices
        mine = torch.nn.functional.pad(mine, (0, 1), value=len(self.centroids))
        # each cluster is fetched once, whoever wants it; a query looks at its own
        wanted, which = mine.unique(return_inverse=True)
        first, size = self.starts[wanted], self.starts[wanted + 1] - self.starts[wanted]
        cluster = torch.repeat_interleave(torch.arange(len(wanted)), size)
        within = torch.arange(len(cluster)) - (size.cumsum(0) - size)[cluster]
        at = first[cluster] + within
        member = torch.zeros(m, len(wanted), dtype=torch.bool).scatter_(1, which.view(mine.shape), True)[:, cluster]
        scores = q @ self.keys.index_select(0, at).to(q.dtype).T
        scores = scores.masked_fill(~member, float("-inf"))
        best = scores.topk(min(count, scores.shape[1]), -1)
        ids = self.ids[at[best.indices]].long().masked_fill(best.values.isneginf(), -1)
        return torch.nn.functional.pad(ids, (0, count - ids.shape[1]), value=-1), float(member.sum())


def _clustered(keys: Tensor, each: int, rounds: int) -> tuple[Tensor, Tensor]:
    """The cluster of each key [n], and the means of the clusters [C,D]; those that are empty are left out."""
    C = max(1, len(keys) // each)
    means = keys[torch.linspace(0, len(keys) - 1, C).round().long()]
    scores = keys.new_empty(len(keys), C)
    for _ in range(rounds):
        owner = _nearest(keys, means, scores)
        size = torch.bincount(owner, minlength=C)
        sums = torch.zeros_like(means).index_add_(0, owner, keys)
        means = torch.where(size[:, None] > 0, sums / size.clamp_min(1)[:, None], means)
    owner = _nearest(keys, means, scores)
    real = torch.bincount(owner, minlength=C) > 0
    return (real.cumsum(0) - 1)[owner], means[real]


def _nearest(keys: Tensor, means: Tensor, scores: Tensor) -> Tensor:
    """The mean that is nearest to each key [n], by way of `scores` [n,C], the same memory in every round.

    Memory that is new in each round costs as much as the product itself; and numpy looks for the largest of many short
    rows several times as fast as torch does.
    """
    torch.mm(keys, means.T, out=scores).sub_(means.square().sum(-1) / 2)
    return torch.from_numpy(scores.numpy().argmax(-1))
