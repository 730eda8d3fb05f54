"""Indices of all rows and key heads of a call, built in a thread of their own while decoding goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from saccade.kernels.search.api import Index, index


class Indices:
    """One index for each row and key head, ready some time later.

    Args:
        kind: see `saccade.kernels.search.index`.
        keys: [B,G,n,D]; a copy in host memory is made before this returns, so that they may change afterwards. Or what
            gives them, asked for in the thread: they must not change while it reads them.
        covers, rows: how many keys and rows of a batch that will be; only where `keys` is to be asked.
        queries: [B,H,m,D] to learn from, or None; heads that share a key head lie side by side.
        arguments: of the index.

    Example:
        >>> made = Indices("flat", torch.eye(3).view(1, 1, 3, 3), None, {})
        >>> made.wait()
        >>> made.search(torch.tensor([[[[0.0, 2.0, 1.0]]]]), 2)[0].tolist()
        [[[[1, 2]]]]
    """

    def __init__(
        self,
        kind: str,
        keys: Tensor | Callable[[], Tensor],
        queries: Tensor | None,
        arguments: dict[str, Any],
        covers: int | None = None,
        rows: int | None = None,
    ) -> None:
        if isinstance(keys, Tensor):
            covers, rows = keys.shape[2], keys.shape[0]
            keys = keys.detach().to("cpu", copy=True)
        assert covers is not None and rows is not None
        self.covers = covers
        self._rows = list(range(rows))
        queries = None if queries is None else queries.detach().to("cpu", copy=True)
        worker = ThreadPoolExecutor(1, "saccade-index")
        self._built: Future[list[list[Index]]] = worker.submit(_build, kind, keys, queries, arguments)
        worker.shutdown(wait=False)

    def ready(self) -> bool:
        """Is it built? What went wrong in the thread is raised here."""
        if self._built.done():
            self._built.result()
            return True
        return False

    def wait(self) -> None:
        """Wait until it is built."""
        self._built.result()

    def search(self, q: Tensor, count: int) -> tuple[Tensor, float]:
        """q [B,H,N,D] -> ids [B,H,N,count] on q's device, -1 = none, and the keys scanned in all."""
        built = self._built.result()
        B, H, N, D = q.shape
        G = len(built[0])
        asked = q.detach().to("cpu").reshape(B, G, -1, D)
        ids, scanned = torch.full((B, G, asked.shape[2], count), -1), 0.0
        for b, row in enumerate(self._rows):
            for g in range(G):
                found = built[row][g].search(asked[b, g], count)
                ids[b, g] = found.ids
                scanned += found.scanned * asked.shape[2]
        return ids.view(B, H, N, count).to(q.device), scanned

    def select(self, rows: Tensor) -> Indices:
        """The same for some rows of the batch; nothing is built again."""
        other = object.__new__(Indices)
        other.covers, other._built, other._rows = self.covers, self._built, [self._rows[r] for r in rows.tolist()]
        return other

    def bytes(self) -> int:
        """Bytes of what is built; 0 until then."""
        if not self._built.done():
            return 0
        built = self._built.result()
        return sum(made.bytes() for row in sorted(set(self._rows)) for made in built[row])


def _build(
    kind: str, keys: Tensor | Callable[[], Tensor], queries: Tensor | None, arguments: dict[str, Any]
) -> list[list[Index]]:
    keys = keys if isinstance(keys, Tensor) else keys()
    B, G = keys.shape[:2]
    rows = []
    for b in range(B):
        row = []
        for g in range(G):
            made = index(kind, **arguments)
            made.build(keys[b, g], None if queries is None else queries[b].unflatten(0, (G, -1))[g].flatten(0, 1))
            row.append(made)
        rows.append(row)
    return rows
