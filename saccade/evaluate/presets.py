"""Presets: the name of a method -> a Plan with sensible arguments for a model and a length."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from saccade.core.errors import PlanError
from saccade.core.plan import PHASES, Assign, ModelShape, Plan, read_text
from saccade.core.table import METHODS, build, find
from saccade.evaluate.budget import scaled, split
from saccade.evaluate.model import READER, Loaded
from saccade.methods.base import CachePolicy
from saccade.reader.books import DATA

PLANS = DATA / "plans"
DENSE = "dense"
CONTROLS = (DENSE, "streaming", "random", "oracle")
NEEDS = {"fetch": "offload"}  # methods that read less than everything only beside a policy


def preset(name: str, model: Any, length: int, *, bundled: bool = False) -> Plan:
    """The plan of a method, or of several joined by "+", for prompts of about `length` tokens.

    A method stands in every phase that it serves. Budgets are set so that it reads a tenth to a fifth of what
    dense attention reads at 8k to 32k tokens. In a combination with a cache policy the heads that the policy names
    follow it in decoding, and in prefill, too, where it shows them a window (`duo`, `moa`); the other methods serve the
    remaining heads. A policy that reads a prompt whole and evicts afterwards (`snapkv`, `h2o`, `razor`) leaves prefill
    to the others.

    Args:
        name: `"minference"`, `"minference+duo"`, ... (`saccade list`); `"minference@0.05"` reads about that share of
            what dense attention reads (`saccade.evaluate.budget`).
        model: a ModelShape, a model or its config.
        length: tokens of the prompts.
        bundled: the model is the reader, so that plans shipped with it are used; one for a method and the policy that
            it needs stands for both, wherever the two are named without a share.

    Raises:
        PlanError: an unknown name, a layer with its own weights, a method that must be fitted first, a share that is
            not in (0, 1], or that was given to a method without a budget, or to one whose budget means nothing without
            a policy that is not there.

    Example:
        >>> plan = preset("trishape+tidal", ModelShape(8, 4, 2), 8192)
        >>> [(a.method, a.phase) for a in plan.layers[0]]
        [('trishape', 'prefill'), ('tidal', 'decode')]
    """
    shape = ModelShape.of(model)
    names = [part.strip() for part in name.split("+")]
    parts, rest = _shipped_together(names, shape) if bundled else ([], names)
    parts += [_single(part, shape, length, bundled) for part in rest]
    policies = [part for part in parts if phases(part) == {"cache"}]
    _check_shares(name, policies)
    plan = parts[0]
    for part in parts[1:]:
        plan = plan.also(part)
    for policy in policies:
        plan = _beside(plan, policy)
    return Plan(plan.model, plan.layers, note=name)


def resolve(name: str, loaded: Loaded, length: int) -> Plan | None:
    """What a command line calls a plan: a plan file, a preset, or "dense" = None, stock transformers.

    Raises:
        PlanError, FileError: no such method; an unreadable file, or a plan for another model.
    """
    if name == DENSE:
        return None
    if looks_like_file(name):
        plan = read_plan(name, loaded.model)
        plan.check_model(loaded.model)
        return plan
    return preset(name, loaded.model, length, bundled=loaded.name == READER)


def read_plan(path: str, model: Any = None) -> Plan:
    """A plan from a file: saccade's own JSON, or what MInference (JSON) and DuoAttention (TSV) published.

    Args:
        path: the file.
        model: a ModelShape, model or config: published files do not say how query heads share key heads.

    Raises:
        PlanError, FileError: none of the three, or for another model.
    """
    start = read_text(path).lstrip()[:1]
    if start == "{":
        return Plan.load(path)
    from saccade.fit.published import from_duo, from_minference

    if start == "[":
        return from_minference(path, model)
    return from_duo(path, model)


def looks_like_file(name: str) -> bool:
    """A method's name has neither a suffix nor a slash."""
    return name.endswith((".json", ".tsv")) or os.sep in name or (name not in METHODS and os.path.isfile(name))


def phases(plan: Plan) -> set[str]:
    """The phases that any assignment of a plan serves."""
    return {assign.phase for row in plan.layers for assign in row}


def note(plan: Plan | None) -> str:
    """What of a plan is left dense, in words for a table."""
    if plan is None:
        return "stock transformers"
    used, policies = phases(plan), {find(a.method) for row in plan.layers for a in row if a.phase == "cache"}
    if any(windowed(policy) for policy in policies):
        used.add("prefill")
    if not all(policy.lossless for policy in policies):
        used.add("decode")
    return ", ".join(f"{phase} dense" for phase in ("prefill", "decode") if phase not in used)


def defaults(loaded: Loaded, length: int) -> list[str]:
    """The methods that `saccade demo` compares with dense: those that can be set up for this model."""
    wanted = ("streaming", "trishape", "minference", "tidal", "minference+tidal", "duo", "minference+duo")
    return [name for name in wanted if _possible(name, loaded, length)]


def arguments(name: str, layers: int, length: int) -> dict[str, Any]:
    """Hyperparameters of one method for a model of so many layers and prompts of about `length` tokens."""
    recent, first = max(64, length // 24), min(2, layers // 4)
    # ten blocks of 64 at least (a fifth of short texts): of 64 queries that choose together one may ask, and its block
    # is no higher up
    blocks = min(0.2, max(0.05, 600 / length))
    return {
        "streaming": {"sink": 64, "recent": recent},
        "trishape": {"sink": 64, "recent": max(256, length // 64)},
        # the nearest 100 offsets are read in any case; each one beyond may cost two blocks of 64
        "minference": {"columns": max(64, length // 32), "diagonals": 101 + length // 8192},
        # shares of all keys: early queries have fewer, so about twice the share is what is read of the causal half
        "pooled": {"budget": blocks},
        # half of what is read comes from the estimate: 1/stride of dense
        "xattention": {"stride": 16, "block": 64, "most": 0.03},
        # no tighter than about the paper's least budget, 1024 tokens: where one of 64 last queries asks, the block it
        # asks for is among the first dozen
        "flexprefill": {"block": 64, "least": max(64, length // 32), "most": min(1.0, max(0.08, 900 / length))},
        "s2": {"local": max(2, length // 4096), "stride": 16},
        # a level of halves reads block + samples keys a row
        "hyper": {
            **{"block": max(32, length // 256), "samples": max(32, length // 256)},
            # a little less than a sixteenth, so that prompts a little shorter are halved as often
            "exact_below": max(64, length // 17),
        },
        "above": {"inner": {"method": "streaming", "args": {"sink": 64, "recent": recent}}, "length": 4096},
        "hip": {"budget": max(512, length // 16), "sink": 64, "first": first},
        "infinitehip": {
            **{"budget": max(512, length // 16), "sink": 64, "window": 128, "chunks": [64, 16], "first": first},
            **{"keep": [max(1024, length // 8)], "strides": [8, 4], "refresh": [4, 2]},
        },
        # as if the model had been trained on an eighth
        "hipextend": {
            **{"trained": max(512, length // 8), "keys": max(320, length // 24 // 16 * 16), "sink": 32, "window": 64},
            **{"chunks": [64, 16], "keep": [max(1024, length // 8)], "strides": [8, 4], "refresh": [4, 2]},
            "indexed": min(3, layers // 4),
        },
        # choosing costs a product for each chunk, half of what is read
        "longheads": {"keys": max(512, length // 512 * 32), "chunk": 32},
        "hard": {"budget": max(64, length // 32)},
        # the shares of the official code, a tenth each
        "h2o": {"heavy": max(1, length // 10), "recent": max(1, length // 10)},
        # an answer is read off token by token, behind what the question looked at: neighbours must stay. With 7, as
        # published for tokens of several characters, the reader's copies of seven one-digit tokens break off
        "snapkv": {"capacity": max(128, length // 10), "kernel": 23},
        "oracle": {"budget": blocks},
        "random": {"budget": blocks},
        # the paper picks in layers 2 and 13 of 32
        "tidal": {"budget": max(256, length // 64), "first": first, "correct": max(first + 1, layers * 13 // 32)},
        # two of 32 layers dense in the paper; two products for each page of 8, beside what is read. Pages of 16 cost
        # half of that and lose lists of like keys: 14 of the reader's 46 key-value answers at 32k, pages of 8 one
        "quest": {"budget": max(512, length // 16), "block_k": 8, "first": layers // 16},
        # a full step costs two: it is read, and scored once more; answers of more than three tokens lie beyond the
        # paper's maximum over 7 neighbours
        "recycled": {"budget": max(256, length // 48), "stride": 50, "kernel": 15},
        # clusters are there at once, where the graph takes seconds to build and exact search stands in for it; and an
        # evaluation comes out the same each time only if no step is taken before the index is there
        "retrieval": {
            **{"budget": 64 + max(192, length // 32) + 100, "sink": 64, "near": max(192, length // 32)},
            **{"kind": "lists", "wait": True},
        },
        # blocks of 8 for the same reason as quest's pages: with blocks of 32 the reader finds 2 of 50 key-value answers
        "fetch": {"blocks": max(16, length // 256)},
        "offload": {"sink": 64, "recent": max(192, length // 32), "block": 8},
        # in the prompt 17 blocks of 16 that are always read, and half of the others
        "actqkv": {
            "budget": 16 * (17 + 2 * max(16, length // 512)),
            **{"window": 128, "block_k": 16, "sink": 64, "near": 64},
        },
    }.get(name, {})


def _single(name: str, shape: ModelShape, length: int, bundled: bool) -> Plan:
    method, share = split(name)
    if share is not None:
        return scaled(_single(method, shape, length, bundled), share, length)
    cls = find(name)
    if "layer" in cls.phases:
        raise PlanError(f"{name}: a layer with its own weights cannot be put into a pretrained model's plan")
    shipped = PLANS / f"{name}.json"
    if bundled and shipped.is_file():
        plan = Plan.load(shipped)
        plan.check_model(shape)
        return plan
    if name == "seer":
        raise PlanError(
            "seer: its gate must be trained for each model: fit one with saccade.fit.seer, name its file as `weights` "
            "in a plan, and give the plan's file"
        )
    if name in ("duo", "razor", "moa"):
        found = "how far each head reads" if name == "moa" else "which heads it serves"
        published = " (or read a published one with saccade.fit.published)" if name == "duo" else ""
        raise PlanError(
            f"{name}: {found} must be found for each model: make a plan with saccade.fit.{name}{published}, save it, "
            "and give the file"
        )
    args = arguments(name, shape.layers, length)
    return Plan.uniform(shape, **{phase: (name, args) for phase in PHASES if phase in build(name, args).phases})


def _shipped_together(names: Sequence[str], shape: ModelShape) -> tuple[list[Plan], list[str]]:
    """The reader's plans for a method with the policy that it needs, and the names that they do not stand for."""
    found, rest = [], list(names)
    for method, policy in NEEDS.items():
        shipped = PLANS / f"{method}+{policy}.json"
        if method in rest and policy in rest and shipped.is_file():
            found.append(Plan.load(shipped))
            found[-1].check_model(shape)
            rest = [name for name in rest if name not in (method, policy)]
    return found, rest


def _check_shares(name: str, policies: Sequence[Plan]) -> None:
    """Refuse a share of a method that reads everything because the policy it goes with is missing."""
    there = {a.method for part in policies for row in part.layers for a in row}
    for part in name.split("+"):
        method, share = split(part.strip())
        needed = NEEDS.get(method)
        if share is not None and needed is not None and needed not in there:
            raise PlanError(
                f"{name}: {method} reads less than everything only of what {needed} has moved away, so a share of it "
                f"means nothing here; name {part.strip()}+{needed}"
            )


def _beside(plan: Plan, policy: Plan) -> Plan:
    """The plan with the heads that follow a cache policy taken out of its prefill and decode methods."""
    layers = []
    for row, kept in zip(plan.layers, policy.layers, strict=True):
        taken = {phase: _followers(plan.model, kept, phase) for phase in ("prefill", "decode")}
        left = []
        for assign in row:
            gone = taken.get(assign.phase)
            if not gone:
                left.append(assign)
                continue
            heads = range(plan.model.heads) if assign.heads is None else assign.heads
            rest = tuple(h for h in heads if h not in gone)
            if rest:
                left.append(replace(assign, heads=rest))
        layers.append(tuple(left))
    return Plan(plan.model, tuple(layers), plan.note)


def _followers(shape: ModelShape, kept: Sequence[Assign], phase: str) -> set[int]:
    """Query heads whose policy says what they see in a phase, so that no other method is to stand there."""
    share, found = shape.heads // shape.kv_heads, set()
    for assign in kept:
        policy = find(assign.method)
        # tokens that are only elsewhere are still to be read by the other methods
        if policy.lossless or (phase == "prefill" and not windowed(policy)):
            continue
        heads = range(shape.kv_heads) if assign.heads is None else assign.heads
        found |= {g * share + i for g in heads for i in range(share)}
    return found


def windowed(policy: type[CachePolicy]) -> bool:
    """Does a policy show its heads less than all that is stored? Else a first prompt is read whole, and cut later."""
    return policy.pattern is not CachePolicy.pattern


def _possible(name: str, loaded: Loaded, length: int) -> bool:
    try:
        preset(name, loaded.model, length, bundled=loaded.name == READER)
    except PlanError:
        return False
    return True


def names_of(text: str | Sequence[str] | None) -> list[str]:
    """Names from "a,b" or a list, each once, in order.

    Example:
        >>> names_of("needle,kv,needle")
        ['needle', 'kv']
    """
    given = text.split(",") if isinstance(text, str) else list(text or ())
    return list(dict.fromkeys(name.strip() for name in given if name.strip()))
