"""What is looked at before a plan goes to work on a model: what cannot be served is refused while nothing is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.cache.store import Store
from saccade.core.errors import InputError, PlanError, UnsupportedError
from saccade.core.plan import Plan
from saccade.hf.interface import server_of, text_config
from saccade.methods.apply import Roles
from saccade.methods.base import CachePolicy
from saccade.methods.policy.offload import Offload, Wanted, check_room

Kept = Sequence[tuple[tuple[int, ...], CachePolicy]]  # key heads and their policy


@dataclass(frozen=True)
class Case:
    """A plan and a model that are to go together.

    Args:
        model, plan: as given to `attach`.
        modules: the model's attention modules by layer.
        served: layers that a plan can serve.
        roles: what the plan puts into each layer.
    """

    model: Any
    plan: Plan
    modules: Mapping[int, torch.nn.Module]
    served: Sequence[int]
    roles: Sequence[Roles]

    def held(self, layer: int, lossless: bool) -> set[int]:
        """Query heads of which a policy drops tokens, or moves them elsewhere."""
        share = self.plan.model.heads // self.plan.model.kv_heads
        kept = [heads for heads, policy in self.roles[layer].cache if policy.lossless == lossless]
        return {h * share + i for heads in kept for h in heads for i in range(share)}

    def ids(self, heads: tuple[int, ...] | None) -> tuple[int, ...]:
        """Query heads by number; None = all."""
        return tuple(range(self.plan.model.heads)) if heads is None else tuple(sorted(heads))


def check(case: Case) -> None:
    """Refuse what cannot be served.

    Raises:
        PlanError: the plan is for another model, or its parts contradict each other.
        InputError, SpaceError: the model has a plan, or what this one keeps elsewhere has no room at all.
        UnsupportedError: the model is none that a plan can serve.
    """
    case.plan.check_model(case.model)
    _check_model(case)
    whole = [m for roles in case.roles for _, m in (*roles.prefill, *roles.decode) if m.whole_store]
    if whole and any(roles.cache for roles in case.roles):
        raise PlanError(f"{type(whole[0]).__name__} needs every token in the cache, but the plan also evicts")
    for layer in case.served:
        _check_policies(case, layer)
        _check_sources(case, layer)
        _check_phases(case, layer)
    check_space(case.model, case.modules, {layer: case.roles[layer].cache for layer in case.served})


def check_space(
    model: Any, modules: Mapping[int, torch.nn.Module], policies: Mapping[int, Kept], length: int = 0, rows: int = 1
) -> None:
    """Is there space for what is to be kept elsewhere, as far as sizes are known?

    Args:
        length: tokens expected; 0 = not known.
        rows: of a batch whose rows differ in length, so that each has a cache of its own; 1 where they do not.
    """
    size = torch.empty((), dtype=getattr(model, "dtype", None)).element_size()
    elsewhere = [
        Wanted(policy, len(heads), 2 * getattr(modules[layer], "head_dim", 0) * size)
        for layer, kept in policies.items()
        for heads, policy in kept
        if isinstance(policy, Offload)
    ]
    check_room(elsewhere, length, rows)


def check_rows(model: Any, modules: Mapping[int, torch.nn.Module], stores: Mapping[int, Store], added: Tensor) -> None:
    """Is there space for each row, where a batch is about to become one whose rows differ in length?

    Asked before any of it is read: a short row puts nothing away at first, and what lacks would show in the middle of
    an answer.

    Args:
        stores: of all layers that the plan serves.
        added: which tokens of the next call are real, bool [B,n].

    Raises:
        InputError: the block caches of all rows and layers together hold less than a block for each.
    """
    one = next(iter(stores.values()))
    # rows that were together when tokens were moved go on with one cache
    apart, moved = len(one.memory) > 1, any(group.lengths != one.seen for group in one.groups)
    if not apart and not moved and not bool((added == added[:1]).all()):
        check_space(model, modules, {at: store.policies for at, store in stores.items()}, rows=len(added))


def _check_model(case: Case) -> None:
    """Is it a decoder that nobody else has, with layers that the plan names?"""
    name = type(case.model).__name__
    if any(server_of(module) is not None for module in case.modules.values()):
        raise InputError("attach: this model already has a plan; detach() that session first")
    if not case.modules:
        raise UnsupportedError(
            f"attach: {name} has no attention modules with a layer_idx that go through transformers' attention "
            "interface"
        )
    if getattr(case.model.config, "is_encoder_decoder", False):
        raise UnsupportedError(f"attach: {name} has an encoder; only decoders are served")
    if any(getattr(case.modules[layer], "is_causal", True) is False for layer in case.served):
        raise UnsupportedError(
            f"attach: tokens of {name} look at later ones (is_causal=False); only decoders are served"
        )
    named = [at for at, row in enumerate(case.plan.layers) if row]
    if named and not set(named) & set(case.served):
        raise UnsupportedError(
            f"attach: the plan would serve nothing: layers {named} of {name} keep their own attention, which is not "
            f"plainly causal (sliding windows, ...); the plan can serve {list(case.served)}"
        )
    capped = getattr(text_config(case.model), "attn_logit_softcapping", None)
    if capped is not None:
        raise UnsupportedError(
            f"attach: {name} caps its attention logits (attn_logit_softcapping={capped}), which no method here "
            "honours; nothing was changed"
        )


def _check_policies(case: Case, layer: int) -> None:
    """Can each method that decodes read what the policies leave?"""
    gone, away = (case.held(layer, lossless) for lossless in (False, True))
    for heads, method in case.roles[layer].decode:
        mine = set(case.ids(heads))
        lost, far = gone & mine, away & mine
        if not method.reads_far and far:
            raise PlanError(
                f"{type(method).__name__} reads the store only, but in layer {layer} the plan moves tokens of heads "
                f"{sorted(far)} out of it to be read elsewhere; to decode, give these heads retrieval or fetch, or no "
                "method, which is dense"
            )
        if method.unbroken and lost:
            raise PlanError(
                f"{type(method).__name__} needs every token of its heads in the cache, but in layer {layer} the plan "
                f"evicts tokens of heads {sorted(lost)}; give these another method, or none"
            )


def _check_sources(case: Case, layer: int) -> None:
    """Is there what a layer takes over from another?"""
    for heads, method in (*case.roles[layer].prefill, *case.roles[layer].decode):
        source = method.source(layer)
        if source is None:
            continue
        there = [ids for ids, other in case.roles[source].decode if type(other) is type(method)]
        if source not in case.served or not any(case.ids(heads) == case.ids(ids) for ids in there):
            why = "has it not for the same heads" if source in case.served else "keeps its own attention"
            raise PlanError(
                f"{type(method).__name__}: layer {layer} reads what layer {source} picks, but layer {source} {why}; "
                f"this model's layers that a plan can serve are {list(case.served)}"
            )


def _check_phases(case: Case, layer: int) -> None:
    """Does a method that must see every query of its heads see them? Where a policy holds them, it may help out."""
    roles, held = case.roles[layer], case.held(layer, False) | case.held(layer, True)
    sides = (roles.prefill, roles.decode, "decode", held), (roles.decode, roles.prefill, "prefill", set[int]())
    for mine, others, missing, helped in sides:
        for heads, method in mine:
            seen = helped.union(*(case.ids(ids) for ids, other in others if other == method))
            if method.both and not set(case.ids(heads)) <= seen:
                raise PlanError(
                    f"{type(method).__name__}: layer {layer} has it not for {missing}, with the same heads and "
                    "arguments; it needs to see every query, so put it into both phases"
                )
