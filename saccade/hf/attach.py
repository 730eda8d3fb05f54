"""attach: run a plan on a Hugging Face decoder, through public hooks, and leave the model as it was."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from saccade.cache import cap
from saccade.cache.store import Store
from saccade.core.clock import Clock, lap
from saccade.core.errors import InputError
from saccade.core.lasting import lasting
from saccade.core.plan import Plan
from saccade.hf.beside import Beside
from saccade.hf.cache import SaccadeCache, StoreLayer
from saccade.hf.check import Case, check, check_rows, check_space
from saccade.hf.interface import attention_modules, is_plain, switch_back, switch_to, text_config
from saccade.hf.rope import rope_of
from saccade.hf.serve import Request, from_fixed, from_store, from_tensors
from saccade.hf.steps import Steps
from saccade.methods.apply import ASIDE, Roles, Seen
from saccade.methods.base import CachePolicy


class _Under(threading.local):
    """What came with the calls under way, by layer: threads may share a model, each with a cache of its own."""

    def __init__(self) -> None:
        self.now: dict[int, tuple[Any, Tensor | None, Tensor | None]] = {}


class Session:
    """A plan at work on a model, from `attach` to `detach` (or the end of a `with` block).

    Attributes:
        plan: the plan.
        calls: attention calls served per layer since the start.
        ways: how calls were served, counted by (way, layer): "store" (our cache), "steps" (our cache, fixed shapes),
            "other cache", "no cache", "own mask" (a mask of the caller's: dense, by sdpa). "later prompt dense" counts
            calls of "store" once more: their method cannot read what a policy left, so the policy served them.
        watch: None, or a callable that is given every `Seen` (what was looked at, where): for measuring.
        clock: None, or what is told where the time goes (`saccade.evaluate.waterfall`); not for captured steps.
        rng: generator for methods that draw, on the model's device; None = each method's own fixed seed.
    """

    def __init__(self, model: torch.nn.Module, plan: Plan) -> None:
        if not isinstance(plan, Plan):
            raise InputError(
                f"attach: needs a Plan, got {type(plan).__name__}; make one with Plan.uniform(model, prefill=...) or "
                "read one with Plan.load(path)"
            )
        self.model, self.plan = model, plan
        self.watch: Callable[[Seen], None] | None = None
        self.clock: Clock | None = None
        self.rng: torch.Generator | None = None
        config = text_config(model)
        self.modules = attention_modules(model)
        self.calls = dict.fromkeys(self.modules, 0)
        self.ways: Counter[tuple[str, int]] = Counter()
        self._ropes = {at: rope_of(model, module, config, at) for at, module in self.modules.items()}
        # the cache transformers would build knows best which layers are more than plain causal attention
        own = DynamicCache(config=config).layers
        self._left_alone = {at for at, layer in enumerate(own) if not is_plain(layer, config)}
        self._under = _Under()
        self._alone: dict[int, dict[str, Any]] = {}
        self._shared: weakref.WeakKeyDictionary[Any, dict[int, dict[str, Any]]] = weakref.WeakKeyDictionary()
        self._beside = Beside()
        self._roles = [Roles.of(plan, layer) for layer in range(plan.model.layers)]
        self._elsewhere = any(policy.lossless for roles in self._roles for _, policy in roles.cache)
        self._ruled = [any(assign.rules for assign in row) for row in plan.layers]
        self._hooks: list[Any] = []
        self._before: Any = None
        check(Case(model, plan, self.modules, self.served(), self._roles))
        self._start()

    def cache(self, length: int = 0) -> SaccadeCache:
        """A new, empty cache that follows the plan's policies: pass it to `generate(past_key_values=...)`.

        A policy lets 16 tokens be taken back: assisted generation drafts 20 by default, so give it
        `num_assistant_tokens=15`. For training leave caches out (`use_cache=False`).

        Args:
            length: tokens expected; plans with length rules in their cache phase look at it, and policies that keep
                tokens elsewhere ask for the space.

        Raises:
            InputError, SpaceError: no space for so many tokens, or none at all.
        """
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise InputError(f"session.cache: length must be an int >= 0, the tokens expected, got {length!r}")
        ruled = [at for at in self.served() if any(a.rules for a in self.plan.layers[at] if a.phase == "cache")]
        if ruled and not length:
            raise InputError(
                f"session.cache: what the plan keeps depends on the length (layer {ruled[0]}); give it: "
                "session.cache(length=tokens of prompt and answer)"
            )
        # one budget on the device for what all layers keep elsewhere
        shared = {cap.KEY: cap.Cap()}
        policies = {layer: self._policies(layer, length) for layer in self.served()}
        check_space(self.model, self.modules, policies, length)
        stores = {layer: Store(kept, self.plan.model.kv_heads, shared) for layer, kept in policies.items()}
        return SaccadeCache(text_config(self.model), stores)

    def steps(self, cache: SaccadeCache, room: int, graph: bool | None = None) -> Steps:
        """Decode one token at a time from here, on a GPU as a captured graph: see `saccade.hf.steps.Steps`."""
        return Steps(self, cache, room, graph)

    def detach(self) -> None:
        """Give the model back as it was: its attention implementation, no hooks."""
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.remove()
        # once only: by the second time another session may have the model
        if hooks:
            switch_back(self.model, self.modules.values(), self._before)
        # what an exception in the middle of a forward left behind
        self._under.now.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def served(self) -> list[int]:
        """The layers whose attention the plan serves; the others (sliding windows) keep their own."""
        return [layer for layer in self.modules if self.serves(layer)]

    def serves(self, layer: int) -> bool:
        """Does the plan serve this layer? Sliding windows and recurrent layers keep their own attention."""
        return layer not in self._left_alone

    def store_layer(self, layer: int) -> StoreLayer | None:
        """This layer of the cache that a call under way came with, where that is a `session.cache()`."""
        cache, *_ = self._under.now.get(layer, (None,))
        layers = getattr(cache, "layers", ())
        own = layers[layer] if layer < len(layers) else None
        return own if isinstance(own, StoreLayer) else None

    @lasting
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """One layer's attention [B,H,N,Dv]; k and v are the new tokens (our cache) or all of them (any other)."""
        cache, x, positions = self._under.now.get(layer, (None, None, None))
        steps = self._alone if cache is None else self._shared.setdefault(cache, {})
        valid = None if mask is None else mask[:, 0, 0, :].bool()
        if torch.is_autocast_enabled(q.device.type):
            # as for torch's own attention: rotated queries and keys may be wider than values by now
            q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
        fields = dict(layer=layer, scale=scale, rope=self._ropes[layer], rng=self.rng)
        roles = partial(self._roles_at, layer)
        request = Request(q, k, v, valid, x, roles, fields, steps, self.watch, self.clock, positions)
        self.calls[layer] += 1
        lap(self.clock, "rest")
        own = self.store_layer(layer)
        if own is not None and own.fixed is not None:
            own.waiting = False
            self.ways["steps", layer] += 1
            return from_fixed(request, own.fixed)
        if own is not None:
            if self._elsewhere and valid is not None and layer == self.served()[0]:
                stores = {at: cache.layers[at].store for at in self.served()}
                check_rows(self.model, self.modules, stores, valid[:, -q.shape[2] :])
            self.ways["store", layer] += 1
            out = from_store(request, own)
            if any(f"{ASIDE} {layer}" in step for step in steps.values()):
                self.ways[ASIDE, layer] += 1
            return out
        if self._roles[layer].cache:
            raise InputError(
                "this plan has cache policies: pass past_key_values=session.cache() to generate() or to the model"
            )
        self.ways["no cache" if cache is None else "other cache", layer] += 1
        # a static cache hands over all its room, and counts its tokens in a tensor
        held = 0 if cache is None else int(cache.get_seq_length(layer))
        length, served = min(k.shape[2], held or k.shape[2]), self.served()
        if layer == served[0]:
            self._beside.before(cache)
        out = from_tensors(request, length, self._beside.of(cache, layer))
        if layer == served[-1]:
            self._beside.after(cache, layer, k, length)
        return out

    def _policies(self, layer: int, length: int) -> tuple[tuple[tuple[int, ...], CachePolicy], ...]:
        return self._roles_at(layer, length).cache

    def _roles_at(self, layer: int, length: int) -> Roles:
        return Roles.of(self.plan, layer, length) if self._ruled[layer] else self._roles[layer]

    def _start(self) -> None:
        self._before = switch_to(self, self.model, self.modules.values())
        for layer, module in self.modules.items():
            self._hooks.append(module.register_forward_pre_hook(self._before_layer(layer), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after_layer(layer)))

    def _before_layer(self, layer: int) -> Callable[..., None]:
        first = min(self.modules)

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = kwargs.get("hidden_states", args[0] if args else None)
            # GPT-NeoX has another name for it
            cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
            if layer == first and cache is None:
                self._alone = {}
            elif layer == first:
                self._shared[cache] = {}
            self._under.now[layer] = (cache, x, kwargs.get("position_ids"))

        return hook

    def _after_layer(self, layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # a kept reference would keep the cache alive
            self._under.now.pop(layer, None)

        return hook


def attach(model: torch.nn.Module, plan: Plan) -> Session:
    """Run a plan on a Hugging Face decoder.

    Registers an attention function and a mask function under the name "saccade", switches the model to them, and
    hooks its attention modules to learn cache and layer input. Layers with a sliding window keep their own attention.

    Args:
        model: a causal language model of transformers (Llama, Qwen, Mistral, Gemma 3, Phi, ... ).
        plan: a Plan for this model's layers and heads.

    Returns:
        A Session; use it as a context manager, or call `detach()`. `session.cache()` makes the cache to generate with.

    Raises:
        PlanError: the plan is for another model, or its parts contradict each other.
        InputError, SpaceError: what the plan keeps elsewhere has no room at all.
        UnsupportedError: the model does not use transformers' attention interface, or caps its logits.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
        >>> model = LlamaForCausalLM(LlamaConfig(**tiny)).eval()
        >>> with attach(model, Plan.uniform(model, prefill="streaming")) as session:
        ...     out = model(torch.arange(8)[None], past_key_values=session.cache())
        >>> out.logits.shape
        torch.Size([1, 8, 64])
    """
    return Session(model, plan)
