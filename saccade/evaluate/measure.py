"""Measure one method on prompts: answers with their times first, then one watched run for density and mass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from saccade.core.plan import Plan
from saccade.evaluate.generate import Answer, answer, serving
from saccade.evaluate.model import Loaded
from saccade.evaluate.presets import phases
from saccade.evaluate.trace import Trace

WARM = 256  # tokens of the run that is not timed


def answers(
    loaded: Loaded,
    plan: Plan | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 24,
    stop: str = "\n",
    done: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer each prompt in a prefill of its own, with a new cache.

    Args:
        loaded: the model.
        plan: the plan, or None for stock transformers.
        prompts: tokens of each prompt.
        max_new_tokens: most tokens of an answer.
        stop: text that ends an answer.
        done: called with the number of finished answers after each.
    """
    found = []
    with serving(loaded, plan) as cache:
        # first calls pay for allocation and thread start
        answer(loaded, prompts[0][:WARM], cache(WARM), max_new_tokens=2)
        for ids in prompts:
            found.append(answer(loaded, ids, cache(len(ids)), max_new_tokens=max_new_tokens, stop=stop))
            if done is not None:
                done(len(found))
    return found


def times(found: Sequence[Answer]) -> dict[str, Any]:
    """Medians of the times, and the largest cache: ttft_s, tpot_s, kv_bytes."""
    steps = [a.tpot_s for a in found if a.tpot_s is not None]
    return {
        "ttft_s": round(median(a.ttft_s for a in found), 4),
        "tpot_s": round(median(steps), 5) if steps else None,
        "kv_bytes": max(a.kv_bytes for a in found),
    }


def looked(found: Trace | None, plan: Plan | None) -> dict[str, Any]:
    """Density and mass of the phase that a plan makes sparse (prefill where it is both), and both densities.

    Stock attention is 1.0 by definition.
    """
    if plan is None or found is None:
        return {"density": 1.0, "mass": 1.0, "density_prefill": 1.0, "density_decode": 1.0}
    phase = "decode" if phases(plan) == {"decode"} else "prefill"
    prefill, decode = found.density("prefill"), found.density("decode")
    return {
        "density": _short(decode if phase == "decode" else prefill),
        "mass": _short(found.meter.kept(phase)),
        "density_prefill": _short(prefill),
        "density_decode": _short(decode),
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
