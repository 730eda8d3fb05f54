"""The store as a transformers Cache: what `model.generate(past_key_values=session.cache())` takes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from saccade.cache.fixed import Fixed
from saccade.cache.store import Store
from saccade.core.errors import InputError, UnsupportedError

NO_SESSION = "this cache belongs to an attached model: attach(model, plan) first, then use it"


class StoreLayer(CacheLayerMixin):
    """One layer of the cache: counts tokens for transformers, keeps them in a Store for attention.

    `update` hands the new keys and values straight back; the attention function stores them, because only it knows
    which rows are padded. Lengths are tokens seen, not tokens kept: that is what positions come from.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        self.waiting = False
        self.fixed: Fixed | None = None  # during captured steps

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.waiting:
            raise UnsupportedError(NO_SESSION)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.waiting = True
        return key_states, value_states

    def take(self, key_states: Tensor, value_states: Tensor, valid: Tensor | None) -> Store:
        """Store what `update` announced; called by the attention function."""
        self.waiting = False
        self.store.append(key_states, value_states, valid)
        return self.store

    def get_seq_length(self, *args: Any) -> int:
        return self.store.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.total + query_length, 0

    def get_max_length(self) -> int:
        return -1

    # the name before transformers 5.23
    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        self.store.crop(-tokens_to_remove)

    def reset(self) -> None:
        self.waiting = False
        self.store.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.select(torch.arange(len(self.store.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(len(self.store.seen))
        self.store.select(rows[indices.cpu()])

    def fork(self) -> StoreLayer:
        """The layer with a store of its own: see `SaccadeCache.fork`."""
        if self.fixed is not None:
            raise UnsupportedError("a cache cannot be forked during steps of a fixed shape; close() them first")
        other: StoreLayer = copy.copy(self)
        other.store = self.store.fork()
        return other

    def offload(self) -> None:
        raise UnsupportedError("offloading this cache is not part of this version")

    prefetch = offload


class SaccadeCache(Cache):
    """A cache that holds what the plan's policies keep, preallocated and appended in place.

    Made by `session.cache()`. It does all that transformers asks of a cache (crop, reorder, repeat, select, reset).
    Layers that the plan does not serve (sliding windows, recurrent layers) keep transformers' own cache layers.

    Example:
        session.cache().bytes() -> 0
    """

    def __init__(self, config: Any, stores: dict[int, Store]) -> None:
        if getattr(config, "num_kv_shared_layers", 0):
            raise UnsupportedError(
                f"session.cache: {config.num_kv_shared_layers} layers of this model read keys that other layers have "
                "stored, which this cache does not hand out; use transformers' own cache"
            )
        layers = list(DynamicCache(config=config).layers)
        while len(layers) < 1 + max(stores, default=-1):
            layers.append(None)
        for at, store in stores.items():
            layers[at] = StoreLayer(store)
        super().__init__(layers=layers)
        self._last = len(layers)  # the layer that was updated last; a call goes through the layers in order

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What transformers calls in every layer, and the place to notice that the layers do not go together.

        Raises:
            UnsupportedError: the layer before was not answered by an attached plan, but by attention to new tokens.
            InputError: an earlier call broke off between two layers, and some hold tokens that others do not.
        """
        if layer_idx >= len(self.layers):
            raise InputError(f"this cache is for {len(self.layers)} layers, and the model has a layer {layer_idx}")
        mine = self.layers[layer_idx]
        if isinstance(mine, StoreLayer):
            self._follows(mine, layer_idx, key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def _follows(self, mine: StoreLayer, at: int, count: int) -> None:
        before, self._last = self.layers[self._last] if self._last < at else None, at
        if before is None:
            # a single layer cannot tell a call that was refused from one without a plan; others can, just below
            others = (layer for layer in self.layers if layer is not mine)
            mine.waiting = mine.waiting and not any(isinstance(layer, StoreLayer) for layer in others)
            return
        mine.waiting, waiting = False, before.waiting
        if waiting:
            before.waiting = False
            raise UnsupportedError(NO_SESSION)
        if mine.fixed is None and before.get_seq_length() != mine.get_seq_length() + count:
            raise InputError(
                f"layer {at} of this cache holds {mine.get_seq_length()} tokens where the layer before it held "
                f"{before.get_seq_length() - count}: a call broke off between them; reset() the cache or make a "
                "new one, and read the text again"
            )

    def fork(self) -> SaccadeCache:
        """A cache that goes on from here by itself, so that a text is read once and asked many times.

        Keys, values, and what methods and policies remember are copied; neither cache sees what the other reads later.
        `copy.deepcopy(cache)` is the same.

        Raises:
            UnsupportedError: steps of a fixed shape are under way.

        Example:
            one = cache.fork(); model.generate(**first, past_key_values=one)
        """
        other: SaccadeCache = copy.copy(self)
        other.layers = [
            layer.fork() if isinstance(layer, StoreLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> SaccadeCache:
        return self.fork()

    def bytes(self) -> int:
        """Bytes of keys, values and positions in memory, in all layers, room to grow included."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, StoreLayer):
                total += layer.store.bytes()
            else:
                total += cache_bytes(layer)
        return total

    def state_bytes(self) -> int:
        """Bytes that methods remember beside keys and values: block summaries, reused choices, indices."""
        return sum(layer.store.state_bytes() for layer in self.layers if isinstance(layer, StoreLayer))

    def materialize(self, layer: int, kv_head: int, row: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [n,D], values [n,Dv] and positions [n] that one key head holds for one row of the batch."""
        store = self.layers[layer].store
        for group in store.groups:
            if kv_head in group.heads:
                view, at = group.view(slice(row, row + 1)), group.heads.index(kv_head)
                pos = torch.arange(view.k.shape[2]) if view.pos is None else view.pos[0, min(at, view.pos.shape[1] - 1)]
                return view.k[0, at], view.v[0, at], pos
        raise IndexError(f"no key head {kv_head} in layer {layer}")


def cache_bytes(layer: Any) -> int:
    """Bytes of a transformers cache layer's own tensors."""
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
