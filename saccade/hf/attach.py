"""attach: run a plan on a Hugging Face decoder, through public hooks, and leave the model as it was."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saccade.cache import cap
from saccade.cache.fixed import Fixed
from saccade.cache.store import Store, call_for
from saccade.core.call import Call
from saccade.core.clock import Clock, lap
from saccade.core.errors import InputError, PlanError, UnsupportedError
from saccade.core.lasting import lasting
from saccade.core.plan import Plan
from saccade.hf.cache import SaccadeCache, StoreLayer
from saccade.hf.rope import rope_of
from saccade.hf.steps import Steps
from saccade.methods.apply import ASIDE, Roles, Seen, apply, overheard, phase_of
from saccade.methods.base import CachePolicy
from saccade.methods.policy.offload import Offload, Wanted, check_room

NAME = "saccade"
_sessions: weakref.WeakKeyDictionary[torch.nn.Module, Session] = weakref.WeakKeyDictionary()


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
        self.model, self.plan = model, plan
        self.watch: Callable[[Seen], None] | None = None
        self.clock: Clock | None = None
        self.rng: torch.Generator | None = None
        self.modules = _attention_modules(model)
        self.calls = dict.fromkeys(self.modules, 0)
        self.ways: Counter[tuple[str, int]] = Counter()
        self._ropes = {at: rope_of(model, module, _text_config(model), at) for at, module in self.modules.items()}
        # the cache transformers would build knows best which layers are more than plain causal attention
        own = DynamicCache(config=_text_config(model)).layers
        self._left_alone = {at for at, layer in enumerate(own) if type(layer) is not DynamicLayer}
        self._now: dict[int, tuple[Any, Tensor | None]] = {}
        self._steps: dict[int, dict[str, Any]] = {}
        self._memory: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()
        self._roles = [Roles.of(plan, layer) for layer in range(plan.model.layers)]
        self._ruled = [any(assign.rules for assign in row) for row in plan.layers]
        self._hooks: list[Any] = []
        self._before: Any = None
        self._check()
        self._start()

    def cache(self, length: int = 0) -> SaccadeCache:
        """A new, empty cache that follows the plan's policies: pass it to `generate(past_key_values=...)`.

        Args:
            length: tokens expected; plans with length rules in their cache phase look at it, and policies that keep
                tokens elsewhere ask for the space.

        Raises:
            InputError, SpaceError: no space for so many tokens, or none at all.
        """
        # one budget on the device for what all layers keep elsewhere
        shared = {cap.KEY: cap.Cap()}
        policies = {layer: self._policies(layer, length) for layer in self.served()}
        self._check_room(policies, length)
        stores = {layer: Store(kept, self.plan.model.kv_heads, shared) for layer, kept in policies.items()}
        return SaccadeCache(_text_config(self.model), stores)

    def steps(self, cache: SaccadeCache, room: int, graph: bool | None = None) -> Steps:
        """Decode one token at a time from here, on a GPU as a captured graph: see `saccade.hf.steps.Steps`."""
        return Steps(self, cache, room, graph)

    def detach(self) -> None:
        """Give the model back as it was: its attention implementation, no hooks."""
        for hook in self._hooks:
            hook.remove()
        for module in self.modules.values():
            _sessions.pop(module, None)
        if self._hooks:
            _set_implementation(self.model, self._before)
        self._hooks = []
        # what an exception in the middle of a forward left behind
        self._now.clear()

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

    def _policies(self, layer: int, length: int) -> tuple[tuple[tuple[int, ...], CachePolicy], ...]:
        return (Roles.of(self.plan, layer, length) if self._ruled[layer] else self._roles[layer]).cache

    def _check_room(
        self, policies: Mapping[int, Sequence[tuple[tuple[int, ...], CachePolicy]]], length: int = 0
    ) -> None:
        """Is there space for what is to be kept elsewhere, as far as sizes are known?"""
        size = torch.empty((), dtype=getattr(self.model, "dtype", None)).element_size()
        elsewhere = [
            Wanted(policy, len(heads), 2 * getattr(self.modules[layer], "head_dim", 0) * size)
            for layer, kept in policies.items()
            for heads, policy in kept
            if isinstance(policy, Offload)
        ]
        check_room(elsewhere, length)

    def _check(self) -> None:
        self.plan.check_model(self.model)
        config = _text_config(self.model)
        for module in self.modules.values():
            if module in _sessions:
                raise InputError("attach: this model already has a plan; detach() that session first")
        if not self.modules:
            raise UnsupportedError(
                f"attach: {type(self.model).__name__} has no attention modules with a layer_idx that go through "
                "transformers' attention interface"
            )
        for name in ("attn_logit_softcapping",):
            if getattr(config, name, None) is not None:
                raise UnsupportedError(
                    f"attach: {type(self.model).__name__} caps its attention logits ({name}="
                    f"{getattr(config, name)}), which no method here honours; nothing was changed"
                )
        whole = [m for roles in self._roles for _, m in (*roles.prefill, *roles.decode) if m.whole_store]
        if whole and any(roles.cache for roles in self._roles):
            raise PlanError(f"{type(whole[0]).__name__} needs every token in the cache, but the plan also evicts")
        for layer in self.served():
            gone, away = (self._held(layer, lossless) for lossless in (False, True))
            for heads, method in self._roles[layer].decode:
                mine = set(_ids(heads, self.plan))
                lost, far = gone & mine, away & mine
                if not method.reads_far and far:
                    raise PlanError(
                        f"{type(method).__name__} reads the store only, but in layer {layer} the plan moves tokens of "
                        f"heads {sorted(far)} out of it to be read elsewhere; to decode, give these heads retrieval or "
                        "fetch, or no method, which is dense"
                    )
                if method.unbroken and lost:
                    raise PlanError(
                        f"{type(method).__name__} needs every token of its heads in the cache, but in layer {layer} "
                        f"the plan evicts tokens of heads {sorted(lost)}; give these another method, or none"
                    )
        for layer in self.served():
            for heads, method in (*self._roles[layer].prefill, *self._roles[layer].decode):
                source = method.source(layer)
                if source is None:
                    continue
                there = [ids for ids, other in self._roles[source].decode if type(other) is type(method)]
                if not self.serves(source) or not any(_ids(heads, self.plan) == _ids(ids, self.plan) for ids in there):
                    why = "has it not for the same heads" if self.serves(source) else "keeps its own attention"
                    raise PlanError(
                        f"{type(method).__name__}: layer {layer} reads what layer {source} picks, but layer {source} "
                        f"{why}; this model's layers that a plan can serve are {self.served()}"
                    )

        self._check_room({layer: self._policies(layer, 0) for layer in self.served()})

    def _held(self, layer: int, lossless: bool) -> set[int]:
        """Query heads of which a policy drops tokens, or moves them elsewhere."""
        share = self.plan.model.heads // self.plan.model.kv_heads
        kept = [heads for heads, policy in self._roles[layer].cache if policy.lossless == lossless]
        return {h * share + i for heads in kept for h in heads for i in range(share)}

    def _start(self) -> None:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)
        self._before = _implementation(self.model)
        _set_implementation(self.model, NAME)
        for layer, module in self.modules.items():
            _sessions[module] = self
            self._hooks.append(module.register_forward_pre_hook(self._before_layer(layer), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._after_layer(layer)))

    def _before_layer(self, layer: int) -> Callable[..., None]:
        first = min(self.modules)

        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if layer == first:
                self._steps = {}
            x = kwargs.get("hidden_states", args[0] if args else None)
            self._now[layer] = (kwargs.get("past_key_values"), x)

        return hook

    def _after_layer(self, layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # a kept reference would keep the cache alive
            self._now.pop(layer, None)

        return hook

    @lasting
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        """One layer's attention [B,H,N,Dv]; k and v are the new tokens (our cache) or all of them (any other)."""
        cache, x = self._now.get(layer, (None, None))
        own = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
        valid = None if mask is None else mask[:, 0, 0, :].bool()
        self.calls[layer] += 1
        lap(self.clock, "rest")
        if isinstance(own, StoreLayer) and own.fixed is not None:
            own.waiting = False
            self.ways["steps", layer] += 1
            return self._with_fixed(layer, own.fixed, q, k, v, x, scale)
        if isinstance(own, StoreLayer):
            self.ways["store", layer] += 1
            return self._with_store(layer, own, q, k, v, valid, x, scale)
        if self._roles[layer].cache:
            raise InputError(
                "this plan has cache policies: pass past_key_values=session.cache() to generate() or to the model"
            )
        self.ways["no cache" if cache is None else "other cache", layer] += 1
        M = k.shape[2] if cache is None else min(k.shape[2], cache.get_seq_length(layer) or k.shape[2])
        memories = {} if cache is None else self._memory.setdefault(cache, {})
        memory = memories.setdefault(layer, {})
        return self._with_tensors(layer, q, k[:, :, :M], v[:, :, :M], valid, x, scale, memory)

    def _with_store(
        self,
        layer: int,
        own: StoreLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        x: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        N, past = q.shape[2], own.store.total
        valid = None if valid is None else valid[:, -N:]
        if self.clock is not None:
            own.store.settle(self.clock)
        store = own.take(k, v, valid)
        lap(self.clock, "copy")
        whole = valid is None or bool(valid.all())
        phase = phase_of(N, past)
        methods = self._methods(layer, phase, max(store.seen))
        share = q.shape[1] // k.shape[1]
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        asked, later = [], False
        for rows in store.row_sets():
            real = slice(None) if whole or valid is None else valid[rows.start]
            mine = q[rows][:, :, real]
            asked.append(mine)
            if mine.shape[2] == 0:
                continue
            step = self._steps.setdefault(rows.start, {})
            fields = dict(self._fields(layer, scale), step=step, memory=store.memory_of(rows))
            if x is not None:
                fields["x"] = x[rows][:, real]
            for view in store.views(rows):
                heads = tuple(h * share + i for h in view.heads for i in range(share))
                all_heads = len(heads) == q.shape[1]
                q_part = mine if all_heads else mine[:, list(heads)]
                call = call_for(q_part, view, store.seen[rows.start], heads, **fields)
                given = (methods, view.policy, self.watch, view.bias, self.clock, phase)
                o = apply(q_part, view.k, view.v, call, *given)
                if phase == "prefill":
                    overheard(q_part, view.k, call, self._methods(layer, "decode", max(store.seen)))
                    lap(self.clock, "select")
                later = later or f"{ASIDE} {layer}" in step
                if all_heads and whole and rows.stop - rows.start == len(out):
                    out = o
                else:
                    where = torch.arange(N, device=q.device)[real]
                    out[rows][:, torch.tensor(heads, device=q.device)[:, None], where] = o
                    lap(self.clock, "attend")
        if later:
            self.ways[ASIDE, layer] += 1
        store.asked(asked, phase == "prefill", self.clock)
        return out

    def _with_fixed(
        self, layer: int, fixed: Fixed, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None, scale: float | None
    ) -> Tensor:
        """One token in a captured step: nothing here may wait for the device or look at its numbers."""
        fixed.append(k, v)
        lap(self.clock, "copy")
        fixed.asked = q
        share = q.shape[1] // k.shape[1]
        methods = self._methods(layer, "decode", fixed.seen)
        fields = dict(self._fields(layer, scale), x=x, step=self._steps.setdefault(0, {}), memory=fixed.memory)
        packed, outs = q.unflatten(1, (-1, share)), []
        for stretch, ids in zip(fixed.stretches, fixed.ids, strict=True):
            heads = tuple(h * share + i for h in stretch.heads for i in range(share))
            mine = q if len(fixed.ids) == 1 else packed.index_select(1, ids).flatten(1, 2)
            where = dict(q_pos=fixed.q_pos, k_pos=stretch.pos, filled=fixed.filled(stretch))
            call = Call.of(mine, stretch.k, heads=heads, **where, **fields)
            o = apply(mine, stretch.k, stretch.v, call, methods, stretch.policy, self.watch, stretch.bias, self.clock)
            outs.append(o.unflatten(1, (-1, share)))
        if len(outs) == 1:
            return outs[0].flatten(1, 2)
        return torch.cat(outs, 1).index_select(1, fixed.order).flatten(1, 2)

    def _with_tensors(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None,
        x: Tensor | None,
        scale: float | None,
        memory: dict[Any, Any],
    ) -> Tensor:
        """Attention over a cache that is not ours: rows with padding go one by one, without it."""
        B, N, M = q.shape[0], q.shape[2], k.shape[2]
        phase = phase_of(N, M - N)
        methods, later = self._methods(layer, phase, M), self._methods(layer, "decode", M)
        valid = None if valid is None or bool(valid[:, :M].all()) else valid[:, :M]
        if valid is None:
            fields = dict(self._fields(layer, scale), memory=memory, step=self._steps.setdefault(0, {}))
            call = Call.of(q, k, x=x, **fields)
            if phase == "prefill":
                overheard(q, k, call, later)
                lap(self.clock, "select")
            return apply(q, k, v, call, methods, None, self.watch, None, self.clock)
        outs = []
        for row in range(B):
            keys, real = valid[row], valid[row, M - N :]
            out = q.new_zeros((1, q.shape[1], N, v.shape[3]))
            if bool(real.any()):
                part = [t[row : row + 1][:, :, keys] for t in (k, v)]
                lap(self.clock, "copy")
                mine = q[row : row + 1][:, :, real]
                state = dict(memory=memory.setdefault(row, {}), step=self._steps.setdefault(row, {}))
                here = None if x is None else x[row : row + 1][:, real]
                call = Call.of(mine, part[0], x=here, **self._fields(layer, scale), **state)
                if phase == "prefill":
                    overheard(mine, part[0], call, later)
                    lap(self.clock, "select")
                out[:, :, real] = apply(mine, *part, call, methods, None, self.watch, None, self.clock)
            outs.append(out)
        return torch.cat(outs)

    def _fields(self, layer: int, scale: float | None) -> dict[str, Any]:
        """What every call of a layer is told."""
        return dict(layer=layer, scale=scale, rope=self._ropes[layer], rng=self.rng)

    def _methods(self, layer: int, phase: str, length: int) -> Any:
        roles = Roles.of(self.plan, layer, length) if self._ruled[layer] else self._roles[layer]
        return roles.prefill if phase == "prefill" else roles.decode


def _ids(heads: tuple[int, ...] | None, plan: Plan) -> tuple[int, ...]:
    return tuple(range(plan.model.heads)) if heads is None else tuple(sorted(heads))


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


def _attention(
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
    session = _sessions.get(module)
    if session is None:
        raise UnsupportedError("attention 'saccade' was asked for on a model without a plan: attach(model, plan) first")
    # ours is [B,1,1,M] of booleans; a caller's own mask may have one row too, and numbers to add
    custom = attention_mask is not None and (attention_mask.shape[-2] > 1 or attention_mask.dtype != torch.bool)
    if not session.serves(module.layer_idx) or (custom and not isinstance(_own(session, module), StoreLayer)):
        if custom and session.serves(module.layer_idx):
            session.ways["own mask", module.layer_idx] += 1
        dense: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return dense(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if custom:
        raise UnsupportedError(
            "this call has a mask that is more than causality and padding; use transformers' own cache"
        )
    for name in ("s_aux", "softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"layer {module.layer_idx} passes {name}, which no method here honours; detach first"
            )
    if dropout:
        raise UnsupportedError(
            f"attention dropout ({dropout}) is not served; set attention_dropout to 0 or model.eval()"
        )
    out = session.attend(module.layer_idx, query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one layer type: which keys are real, [B,1,1,M], or None. Anything beyond causality goes to sdpa."""
    if local_size is not None or mask_function is not causal_mask_function:
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


def _own(session: Session, module: torch.nn.Module) -> Any:
    cache, _ = session._now.get(module.layer_idx, (None, None))
    layers = getattr(cache, "layers", [])
    return layers[module.layer_idx] if module.layer_idx < len(layers) else None


def _attention_modules(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """The decoder's attention modules by layer: they have a layer_idx and a scale of their own."""
    found: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling"):
            found[module.layer_idx] = module
    return found


def _text_config(model: Any) -> Any:
    if not hasattr(model, "config"):
        raise UnsupportedError(f"attach: {type(model).__name__} is not a model of transformers (it has no config)")
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _implementation(model: Any) -> Any:
    return _text_config(model)._attn_implementation


def _set_implementation(model: Any, name: str) -> None:
    nested = _text_config(model) is not model.config
    model.set_attn_implementation({"text_config": name} if nested else name)
    if _implementation(model) != name:
        raise UnsupportedError(f"attach: {type(model).__name__} does not take an attention implementation of its own")
