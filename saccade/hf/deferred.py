"""Deferred: numbers that a device has not worked out yet, fetched all in one go when somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Take = Callable[[list[float]], None]
MOST = 8192  # tensors that wait at a time


class Deferred:
    """Holds tensors until their numbers are wanted.

    Reading one number of a GPU makes the host wait until all before it is done. Whoever watches a model in every layer
    and step leaves its tensors here instead: that waits for nothing, and `settle` is one wait for each device.

    Example:
        >>> waiting, found = Deferred(), []
        >>> waiting.add(torch.tensor([1, 2]), found.extend)
        >>> found
        []
        >>> waiting.settle()
        >>> found
        [1.0, 2.0]
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Take]] = []

    def add(self, value: Tensor | float, take: Take) -> None:
        """Hand the numbers to `take` when they are there: a number at once, a tensor's in `settle`, as float64."""
        if not isinstance(value, Tensor):
            take([value])
            return
        self._waiting.append((value.detach().double().flatten(), take))
        if len(self._waiting) >= MOST:
            self.settle()

    def settle(self) -> None:
        """Wait for what was added, and hand it on: for each device in the order in which it came."""
        waiting, self._waiting = self._waiting, []
        for device in dict.fromkeys(value.device for value, _ in waiting):
            mine = [(value, take) for value, take in waiting if value.device == device]
            found, at = torch.cat([value for value, _ in mine]).tolist(), 0
            for value, take in mine:
                take(found[at : at + len(value)])
                at += len(value)
