"""The interface: what transformers calls for attention and for masks, and how a model is sent there and back."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saccade.core.errors import UnsupportedError
from saccade.hf.cache import StoreLayer

NAME = "saccade"


class Server(Protocol):
    """Who answers for a model's attention modules: `saccade.hf.attach.Session` is one."""

    ways: Counter[tuple[str, int]]

    def serves(self, layer: int) -> bool:
        """Or does this layer keep its own attention?"""

    def store_layer(self, layer: int) -> StoreLayer | None:
        """This layer of the cache that the call came with, where that is a cache of ours."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """One layer's attention [B,H,N,Dv]."""


# weak at both ends: a session holds its model, so one that is held here would keep a dropped model alive for ever
_servers: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[Server]] = weakref.WeakKeyDictionary()


def server_of(module: torch.nn.Module) -> Server | None:
    """Who answers for an attention module, if anybody does."""
    held = _servers.get(module)
    return None if held is None else held()


def switch_to(server: Server, model: torch.nn.Module, modules: Iterable[torch.nn.Module]) -> Any:
    """Send a model's attention to a server; gives the implementation that it had, for `switch_back`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    before = text_config(model)._attn_implementation
    _set_implementation(model, NAME)
    for module in modules:
        _servers[module] = weakref.ref(server)
    return before


def switch_back(model: torch.nn.Module, modules: Iterable[torch.nn.Module], before: Any) -> None:
    """Give a model its own attention again."""
    for module in modules:
        _servers.pop(module, None)
    _set_implementation(model, before)


def attention_modules(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """The decoder's attention modules by layer: they have a layer_idx and a scale of their own."""
    found: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling"):
            found[module.layer_idx] = module
    return found


def text_config(model: Any) -> Any:
    """The config of the decoder, also where that is a part of a larger model."""
    if not hasattr(model, "config"):
        raise UnsupportedError(f"attach: {type(model).__name__} is not a model of transformers (it has no config)")
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def is_plain(layer: Any, config: Any) -> bool:
    """Is the attention of a layer, of which this is transformers' own cache, plainly causal?

    So is a sliding window as long as the longest sequence that the model is made for (Phi-3 with 128k tokens).
    """
    if type(layer) is DynamicSlidingWindowLayer:
        return _covers(layer.sliding_window, config)
    return type(layer) is DynamicLayer


def _covers(window: int, config: Any) -> bool:
    """Does a sliding window hold the longest sequence that a model is made for?"""
    return window >= (getattr(config, "max_position_embeddings", None) or math.inf)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q [B,H,N,D], k and v [B,G,M,D] -> o [B,N,H,Dv]."""
    server, layer = server_of(module), module.layer_idx
    if server is None:
        raise UnsupportedError("attention 'saccade' was asked for on a model without a plan: attach(model, plan) first")
    served = server.serves(layer)
    # ours is [B,1,1,M] of booleans; a caller's own mask may have one row too, and numbers to add
    custom = attention_mask is not None and (attention_mask.shape[-2] > 1 or attention_mask.dtype != torch.bool)
    if served and custom and server.store_layer(layer) is not None:
        # the keys are in our cache, where sdpa cannot read them
        raise UnsupportedError(
            "this call has a mask that is more than causality and padding; use transformers' own cache"
        )
    for name in ("s_aux", "softcap", "position_bias"):
        # sdpa, too, leaves sinks out, and without a word
        if kwargs.get(name) is not None and (name == "s_aux" or (served and not custom)):
            raise UnsupportedError(f"layer {layer} passes {name}, which no method here honours; detach first")
    if custom or not served:
        if served:
            server.ways["own mask", layer] += 1
        elif not custom:
            attention_mask = _whole(attention_mask, query, key)
        dense: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return dense(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if dropout:
        raise UnsupportedError(
            f"attention dropout ({dropout}) is not served; set attention_dropout to 0 or model.eval()"
        )
    out = server.attend(layer, query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one layer type: which keys are real, [B,1,1,M], or None. Anything beyond causality goes to sdpa."""
    # a window that nothing can leave is causality; transformers says whether the caller added more
    wide = local_size is not None and _covers(local_size, kwargs.get("config")) and local_size >= kv_length
    plain = kwargs.get("allow_is_causal_skip", False) if wide else local_size is None
    if not plain or (mask_function is not causal_mask_function and not wide):
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
    if attention_mask is None:
        return None
    real = attention_mask[:, :kv_length].bool()
    if real.shape[1] < kv_length:
        real = torch.nn.functional.pad(real, (0, kv_length - real.shape[1]))
    return real[:, None, None, :]


def _whole(real: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask for sdpa of a layer that is as plain as ours: `mask` leaves causality to who serves them."""
    N, M = query.shape[2], key.shape[2]
    if N == 1 or (real is None and N == M):
        return real
    seen = torch.ones(1, 1, N, M, dtype=torch.bool, device=query.device).tril(M - N)
    return seen if real is None else seen & real


def _set_implementation(model: Any, name: str) -> None:
    nested = text_config(model) is not model.config
    model.set_attn_implementation({"text_config": name} if nested else name)
    if text_config(model)._attn_implementation != name:
        raise UnsupportedError(f"attach: {type(model).__name__} does not take an attention implementation of its own")
