"""Budgets by share: `NAME@SHARE` is a method's preset with its budget set so that it reads about that share of dense.

What choosing costs comes on top: it hangs on the method and not on its budget. Layers that a method leaves dense stay
dense. A plan that was fitted keeps which head does what; each head gets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from saccade.core.errors import PlanError
from saccade.core.plan import Assign, Plan

Knob = Callable[[int, int, float], dict[str, Any]]


def split(name: str) -> tuple[str, float | None]:
    """A method's name and its share, None where none was given.

    Raises:
        PlanError: a share that is no number in (0, 1].

    Example:
        >>> split("quest@0.05"), split("quest")
        (('quest', 0.05), ('quest', None))
    """
    method, at, text = name.partition("@")
    if not at:
        return name, None
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 < share <= 1.0:
        raise PlanError(f"{name}: the share of dense that is to be read must be in (0, 1], as in {method}@0.05")
    return method.strip(), share


def scaled(plan: Plan, share: float, length: int) -> Plan:
    """The plan with every budget set so that its method reads about `share` of what dense attention reads.

    Args:
        plan: a preset, or a plan that was fitted.
        share: of the causal pairs in prefill, of the keys in decoding, of the tokens in the cache.
        length: tokens of the prompts.

    Raises:
        PlanError: a method without a budget.

    Example:
        >>> from saccade.core.plan import ModelShape
        >>> scaled(Plan.uniform(ModelShape(1, 2, 1), decode=("tidal", {"first": 0})), 0.05, 8000).layers[0][0].args
        {'first': 0, 'budget': 400}
    """
    rows = tuple(tuple(_scaled(assign, share, length) for assign in row) for row in plan.layers)
    return Plan(plan.model, rows, plan.note)


def keys_of(phase: str, share: float, length: int) -> int:
    """Keys that a query reads, where it has as many, for a share of dense.

    In a prefill early queries have fewer: a row of N reads min(its own length, K), which is (2 - K/N) K/N of the pairs.
    """
    part = 1.0 - math.sqrt(1.0 - share) if phase == "prefill" else share
    return max(1, min(length, round(part * length)))


def _scaled(assign: Assign, share: float, length: int) -> Assign:
    knob = KNOBS.get(assign.method)
    if knob is None:
        raise PlanError(
            f"{assign.method}: has no budget that a share of dense could set; methods that have one: {', '.join(KNOBS)}"
        )
    return replace(assign, args={**assign.args, **knob(keys_of(assign.phase, share, length), length, share)})


def _window(keys: int, length: int, share: float) -> dict[str, Any]:
    sink = min(64, keys // 4)
    return {"sink": sink, "recent": max(1, keys - sink)}


def _minference(keys: int, length: int, share: float) -> dict[str, Any]:
    # the nearest 100 offsets are about three blocks of 64, each offset beyond may cost two more; a column is read by
    # later queries only, so that it counts two thirds
    left = max(0, keys - 160)
    more = left // 384
    return {"columns": max(16, round(1.5 * (left - 128 * more))), "diagonals": 101 + more}


def _hyper(keys: int, length: int, share: float) -> dict[str, Any]:
    # half of it in dense blocks at the end of the halving, half in the levels above them
    levels = max(1, round(math.log2(2 / share)))
    drawn = max(8, round(share * length / (9 * levels)))
    return {"block": drawn, "samples": drawn, "exact_below": max(16, round(length / 2**levels * 1.06))}


KNOBS: dict[str, Knob] = {
    "streaming": _window,
    # the last queries, up to 128, read everything
    "trishape": lambda keys, length, share: _window(max(64, keys - 128), length, share),
    "minference": _minference,
    "pooled": lambda keys, length, share: {"budget": keys / length},
    "oracle": lambda keys, length, share: {"budget": keys / length},
    "random": lambda keys, length, share: {"budget": keys / length},
    "seer": lambda keys, length, share: {"budget": keys / length},
    "hard": lambda keys, length, share: {"budget": keys},
    "xattention": lambda keys, length, share: {"most": keys / length},
    "flexprefill": lambda keys, length, share: {"most": keys / length, "least": max(64, keys // 2)},
    "s2": lambda keys, length, share: {"local": max(1, round(keys / 128)), "stride": max(2, round(2 / share))},
    "hyper": _hyper,
    "hip": lambda keys, length, share: {
        "budget": max(64, keys),
        **{"sink": min(64, max(64, keys) // 8), "window": min(128, max(64, keys) // 4)},
    },
    "infinitehip": lambda keys, length, share: {
        "budget": max(64, keys),
        **{"sink": min(64, max(64, keys) // 8), "window": min(128, max(64, keys) // 4)},
    },
    "hipextend": lambda keys, length, share: {
        "keys": max(192, keys // 16 * 16),
        "trained": max(512, length // 8, keys),
    },
    "longheads": lambda keys, length, share: {"keys": max(256, keys // 64 * 64), "chunk": 64},
    "above": lambda keys, length, share: {"inner": {"method": "streaming", "args": _window(keys, length, share)}},
    "tidal": lambda keys, length, share: {"budget": keys},
    "quest": lambda keys, length, share: {"budget": max(32, keys)},
    "recycled": lambda keys, length, share: {"budget": max(2, keys)},
    "retrieval": lambda keys, length, share: {
        "budget": max(16, keys),
        "sink": max(16, keys) // 8,
        "near": max(16, keys) // 2,
    },
    # beside what the policy keeps in the store
    "fetch": lambda keys, length, share: {"blocks": max(1, (keys - 64 - max(192, length // 32)) // 8)},
    # in the prompt 17 blocks of 16 that are always read, and half of the others
    "actqkv": lambda keys, length, share: {"budget": 16 * (17 + 2 * max(1, keys // 16 - 17))},
    "snapkv": lambda keys, length, share: {"capacity": max(64, keys)},
    "h2o": lambda keys, length, share: {"heavy": max(1, keys // 2), "recent": max(1, keys // 2)},
}
