"""The lazy table: method names -> where their classes are, a line each; nothing is imported until it is asked for."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import fields
from typing import Any

from saccade.core.errors import PlanError

METHODS: dict[str, str] = {
    "dense": "saccade.methods.controls.dense:Dense",
    "oracle": "saccade.methods.controls.oracle:Oracle",
    "above": "saccade.methods.controls.above:Above",
    "random": "saccade.methods.controls.random:Random",
    "pooled": "saccade.methods.select.pooled:Pooled",
    "streaming": "saccade.methods.select.streaming:Streaming",
    "trishape": "saccade.methods.select.trishape:TriShape",
    "minference": "saccade.methods.select.minference:MInference",
    "hyper": "saccade.methods.select.hyper:HyperAttention",
    "s2": "saccade.methods.select.s2:S2Attention",
    "xattention": "saccade.methods.select.xattention:XAttention",
    "flexprefill": "saccade.methods.select.flexprefill:FlexPrefill",
    "hip": "saccade.methods.select.hip:HiP",
    "infinitehip": "saccade.methods.select.infinitehip:InfiniteHiP",
    "hipextend": "saccade.methods.select.hipextend:HiPExtend",
    "longheads": "saccade.methods.select.longheads:LongHeads",
    "tidal": "saccade.methods.decode.tidal:TidalDecode",
    "quest": "saccade.methods.decode.quest:Quest",
    "recycled": "saccade.methods.decode.recycled:Recycled",
    "actqkv": "saccade.methods.decode.actqkv:ActQKV",
    "retrieval": "saccade.methods.decode.retrieval:RetrievalAttention",
    "fetch": "saccade.methods.decode.fetch:FetchBlocks",
    "offload": "saccade.methods.policy.offload:Offload",
    "duo": "saccade.methods.policy.duo:DuoAttention",
    "h2o": "saccade.methods.policy.h2o:H2O",
    "snapkv": "saccade.methods.policy.snapkv:SnapKV",
    "razor": "saccade.methods.policy.razor:RazorAttention",
    "moa": "saccade.methods.policy.moa:MoA",
    "routing": "saccade.methods.sparse.routing:RoutingAttention",
    "hard": "saccade.methods.sparse.hard:HardAttention",
    "seer": "saccade.methods.sparse.seer:Seer",
    "lightning": "saccade.methods.linear.lightning:LightningAttention",
}

PLAIN: dict[str, tuple[type, ...]] = {"bool": (bool,), "str": (str,), "str | None": (str, type(None))}


def family(name: str) -> str:
    """The room a method lives in: controls, select, decode, policy, sparse, linear; "own" = not in this package."""
    place = _place(name).split(".")
    return place[2] if place[:2] == ["saccade", "methods"] else "own"


def find(name: str) -> type:
    """The class of a method.

    Raises:
        PlanError: no such method; names the nearest.
    """
    module, _, attribute = _place(name).partition(":")
    found: type = getattr(importlib.import_module(module), attribute)
    return found


def build(name: str, args: dict[str, Any] | None = None) -> Any:
    """A method from its name and hyperparameters.

    Raises:
        PlanError: unknown name or argument (with the nearest one), or a value the method refuses.

    Example:
        >>> build("streaming", {"recent": 128}).recent
        128
    """
    cls, args = find(name), dict(args or {})
    known = [f.name for f in fields(cls)] if hasattr(cls, "__dataclass_fields__") else None
    if known is None:
        raise PlanError(f"{name}: a layer with its own weights cannot be put into a pretrained model's plan")
    for key in args:
        if key not in known:
            raise PlanError(f"{name}: unknown argument {key!r}{_nearest(key, known)}; it takes {', '.join(known)}")
    for f in fields(cls):
        # numbers are checked by the method, which knows their range
        kinds = PLAIN.get(str(f.type))
        if kinds is not None and f.name in args and not isinstance(args[f.name], kinds):
            raise PlanError(f"{name}: {f.name} must be {f.type}, got {str(args[f.name])[:60]!r}")
    try:
        return cls(**args)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{name}: {error}") from error


def _place(name: str) -> str:
    if name not in METHODS:
        raise PlanError(f"unknown method {name!r}{_nearest(name, list(METHODS))}; `saccade list` names all")
    return METHODS[name]


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=1)
    return f", did you mean {near[0]!r}?" if near else ""
