"""Indices of faiss: flat, inverted lists, a hierarchical graph, and a navigating graph drawn by queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.core.errors import InputError
from saccade.kernels.search.api import Found, check_keys, check_kind, check_search
from saccade.kernels.search.graph import Graph


class _Faiss:
    """What the kinds share: float32 on both sides, and keys counted while they are scanned.

    faiss counts in process-wide statistics, which searches of other threads would add to.
    """

    name = "faiss"

    def __init__(self) -> None:
        check_kind(self.name)
        self.made: Any = None
        self.width = self.length = 0

    def build(self, keys: Tensor, queries: Tensor | None = None) -> None:
        """Add the keys."""
        check_keys(self.name, keys)
        self.length, self.width = keys.shape
        self.made = self._make(_array(keys), queries)

    def search(self, queries: Tensor, count: int) -> Found:
        """The largest inner products that the index finds."""
        check_search(self.name, self.width, queries, count)
        before = self._scanned()
        ids = self._ask(_array(queries), min(count, self.length))
        scanned = (self._scanned() - before) / max(1, len(queries))
        found = torch.nn.functional.pad(torch.from_numpy(ids), (0, count - ids.shape[1]), value=-1)
        return Found(found, self._cost(scanned))

    def bytes(self) -> int:
        """Bytes of the index as faiss would write it."""
        import faiss

        return 0 if self.made is None else int(faiss.serialize_index(self.made).nbytes)

    def _make(self, keys: Any, queries: Tensor | None) -> Any:
        raise NotImplementedError(f"{type(self).__name__} must implement _make")

    def _ask(self, queries: Any, count: int) -> Any:
        return self.made.search(queries, count)[1]

    def _scanned(self) -> float:
        return 0.0

    def _cost(self, scanned: float) -> float:
        return scanned


class FaissFlat(_Faiss):
    """IndexFlatIP: exact."""

    name = "faiss-flat"

    def _make(self, keys: Any, queries: Tensor | None) -> Any:
        import faiss

        made = faiss.IndexFlatIP(keys.shape[1])
        made.add(keys)
        return made

    def _cost(self, scanned: float) -> float:
        return float(self.length)


class FaissIVF(_Faiss):
    """IndexIVFFlat: keys in lists by their nearest centroid; the lists whose centroids answer best are scanned.

    Args:
        lists: centroids; None = four times the root of the number of keys.
        probes: lists scanned for a query.
    """

    name = "faiss-ivf"

    def __init__(self, lists: int | None = None, probes: int = 16) -> None:
        super().__init__()
        _positive(self.name, lists=1 if lists is None else lists, probes=probes)
        self.lists, self.probes = lists, probes

    def _make(self, keys: Any, queries: Tensor | None) -> Any:
        import faiss

        n, width = keys.shape
        lists = min(n, self.lists if self.lists is not None else max(1, round(4 * n**0.5)))
        quantizer = faiss.IndexFlatIP(width)
        made = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
        # the number of keys per centroid is the caller's choice, and no reason to print
        made.cp.min_points_per_centroid = 1
        made.train(keys)
        made.add(keys)
        return made

    def _ask(self, queries: Any, count: int) -> Any:
        self.made.nprobe = min(self.probes, self.made.nlist)
        return super()._ask(queries, count)

    def _scanned(self) -> float:
        return float(_statistics().indexIVF_stats.ndis)

    def _cost(self, scanned: float) -> float:
        # centroids are vectors that a query is multiplied with, too
        return scanned + self.made.nlist


class FaissHNSW(_Faiss):
    """IndexHNSWFlat with inner products: a hierarchy of graphs over neighbours among keys. It knows no queries.

    Args:
        degree: edges of a key (twice as many on the ground floor).
        queue: keys in sight while searching; while building, `sight`.
        sight: see queue.
    """

    name = "faiss-hnsw"

    def __init__(self, degree: int = 16, queue: int = 128, sight: int = 200) -> None:
        super().__init__()
        _positive(self.name, degree=degree, queue=queue, sight=sight)
        self.degree, self.queue, self.sight = degree, queue, sight

    def _make(self, keys: Any, queries: Tensor | None) -> Any:
        import faiss

        made = faiss.IndexHNSWFlat(keys.shape[1], self.degree, faiss.METRIC_INNER_PRODUCT)
        made.hnsw.efConstruction = self.sight
        made.add(keys)
        return made

    def _ask(self, queries: Any, count: int) -> Any:
        self.made.hnsw.efSearch = self.queue
        return super()._ask(queries, count)

    def _scanned(self) -> float:
        return float(_statistics().hnsw_stats.ndis)


class FaissNSG(_Faiss):
    """IndexNSGFlat over a graph of our own: edges drawn by queries (see Graph), pruned and walked by faiss.

    NSG prunes by distances. So that the nearest vector is the one with the largest inner product, keys get one channel
    more that makes all of them equally long, and queries a zero there.

    Args:
        degree: edges of a key.
        queue: keys in sight while searching.
    """

    name = "faiss-nsg"

    def __init__(self, degree: int = 32, queue: int = 128) -> None:
        super().__init__()
        _positive(self.name, degree=degree, queue=queue)
        self.degree, self.queue = degree, queue

    def _make(self, keys: Any, queries: Tensor | None) -> Any:
        import faiss

        own = Graph(degree=self.degree)
        own.build(torch.from_numpy(keys), queries)
        edges = own.edges.long()[:, : self.degree]
        # faiss wants full lists: where there are fewer neighbours, the next keys in order stand in
        n, at = len(keys), torch.arange(edges.shape[1])
        edges = torch.where(edges >= 0, edges, (torch.arange(n)[:, None] + 1 + at) % n)
        square = torch.from_numpy(keys).square().sum(-1)
        level = (square.max() - square).clamp_min(0).sqrt()[:, None]
        made = faiss.IndexNSGFlat(keys.shape[1] + 1, self.degree)
        made.build(_array(torch.cat((torch.from_numpy(keys), level), 1)), edges.contiguous().numpy())
        return made

    def _ask(self, queries: Any, count: int) -> Any:
        self.made.nsg.search_L = max(self.queue, count)
        return super()._ask(_array(torch.nn.functional.pad(torch.from_numpy(queries), (0, 1))), count)

    def _cost(self, scanned: float) -> float:
        # faiss does not count here
        return float("nan")


def _statistics() -> Any:
    import faiss

    return faiss.cvar


def _array(t: Tensor) -> Any:
    return t.detach().to("cpu", torch.float32).contiguous().numpy()


def _positive(name: str, **values: int) -> None:
    for what, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: {what} must be an int >= 1, got {value!r}")
