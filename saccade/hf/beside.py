"""What methods remember beside a cache that is not ours, whose rows may change places without a word."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.cache.store import rows_of


class Newest(NamedTuple):
    """The newest key of each row after a forward: of the last layer, where it depends on all that the row has read."""

    layer: int
    tokens: int
    keys: Tensor  # [B,G,D]


class Beside:
    """The methods' memory of each layer, for each cache, as long as the cache lives.

    transformers moves the rows of its own caches in beam search, and tells nobody. So before a forward the newest keys
    of the last one are looked for: where they have moved, what is remembered moves with them, and where they are gone,
    it is given up, so that methods begin anew with what the cache holds. Costs a look at one key a row and step, for
    batches alone.
    """

    def __init__(self) -> None:
        self._memories: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()
        self._newest: weakref.WeakKeyDictionary[Any, Newest] = weakref.WeakKeyDictionary()

    def of(self, cache: Any, layer: int) -> dict[Any, Any]:
        """The memory of a layer; a new one without a cache."""
        return {} if cache is None else self._memories.setdefault(cache, {}).setdefault(layer, {})

    def before(self, cache: Any) -> None:
        """At the first layer of a forward: where are the rows now?"""
        newest = self._newest.pop(cache, None) if cache is not None else None
        if newest is None or int(cache.get_seq_length(newest.layer)) < newest.tokens:
            # tokens that were taken back are the methods' own affair
            return
        keys = _keys(cache, newest.layer)
        if keys is None:
            return
        there = keys[:, :, newest.tokens - 1]
        if there.shape == newest.keys.shape and torch.equal(there, newest.keys):
            return
        old = self._memories.pop(cache)
        # two rows with the same newest key have read the same, and remember the same
        same = (there[:, None] == newest.keys).flatten(2).all(-1)
        if bool(same.any(1).all()):
            index = same.int().argmax(1)
            self._memories[cache] = {layer: _moved(memory, index) for layer, memory in old.items()}

    def after(self, cache: Any, layer: int, k: Tensor, tokens: int) -> None:
        """At the last layer of a forward, k [B,G,M,D] with so many tokens: what to look for next time."""
        if cache is not None and k.shape[0] > 1 and any(self._memories.get(cache, {}).values()):
            self._newest[cache] = Newest(layer, tokens, k[:, :, tokens - 1].clone())


def _moved(memory: dict[Any, Any], index: Tensor) -> dict[Any, Any]:
    """The memory of a layer with its rows in other places; where they go one by one, each has its own."""
    alone = {key for key in memory if isinstance(key, int)}
    together = rows_of({key: held for key, held in memory.items() if key not in alone}, index)
    first = torch.zeros(1, dtype=torch.long)
    return together | {at: rows_of(memory[i], first) for at, i in enumerate(index.tolist()) if i in alone}


def _keys(cache: Any, layer: int) -> Tensor | None:
    layers = getattr(cache, "layers", ())
    keys = getattr(layers[layer], "keys", None) if layer < len(layers) else None
    return keys if isinstance(keys, Tensor) else None
