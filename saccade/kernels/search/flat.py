"""Flat: every key is scored. Exact, and the measure of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.kernels.search.api import Found, check_keys, check_search

TILE = 1 << 24  # scores held at a time


class Flat:
    """All inner products, and the largest of them.

    Example:
        >>> flat = Flat()
        >>> flat.build(torch.eye(3))
        >>> flat.search(torch.tensor([[0.0, 2.0, 1.0]]), 5).ids.tolist()
        [[1, 2, 0, -1, -1]]
    """

    def __init__(self) -> None:
        self.keys = torch.zeros(0, 0)

    def build(self, keys: Tensor, queries: Tensor | None = None) -> None:
        """Nothing is made: the keys are kept as they are."""
        check_keys("flat", keys)
        self.keys = keys

    def search(self, queries: Tensor, count: int) -> Found:
        """The largest inner products, exactly."""
        check_search("flat", self.keys.shape[1], queries, count)
        return Found(nearest(queries, self.keys, count), float(len(self.keys)))

    def bytes(self) -> int:
        """Bytes of the keys."""
        return self.keys.numel() * self.keys.element_size()


def nearest(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """Ids of the `count` keys with the largest inner product [m,count], best first, -1 where there are fewer."""
    n, parts = len(keys), []
    for q in queries.split(max(1, TILE // n)):
        parts.append((q.to(keys.dtype) @ keys.T).topk(min(count, n), -1).indices)
    ids = torch.cat(parts) if parts else torch.zeros(0, min(count, n), dtype=torch.long)
    return torch.nn.functional.pad(ids, (0, count - ids.shape[1]), value=-1)
