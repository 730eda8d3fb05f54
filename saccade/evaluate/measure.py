"""Measure one method on prompts: answers with their times first, then one watched run for density and mass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.generate import Answer, answer, held, now, serving
from saccade.evaluate.model import Loaded
from saccade.evaluate.presets import phases
from saccade.evaluate.trace import Trace

if TYPE_CHECKING:
    from saccade.evaluate.tasks.base import Outcome, Reading, Sample

WARM = 256  # tokens of the run that is not timed
ROWS = 1024  # tokens whose logits are turned to float32 at once


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


def outcomes(loaded: Loaded, plan: Plan | None, task: Reading, samples: Sequence[Sample]) -> list[Outcome]:
    """Let a task read its samples by itself, each in new caches."""
    with serving(loaded, plan) as cache:
        answer(loaded, samples[0].ids[:WARM], cache(WARM), max_new_tokens=2)
        return [task.run(loaded, cache, sample) for sample in samples]


@torch.inference_mode()
def losses(loaded: Loaded, ids: Sequence[int], cache: Any, *, scored: int, steps: int = 0) -> tuple[Tensor, Answer]:
    """The loss of each of the last tokens of a text, and what reading it took.

    All but the end is read in one pass; the last `steps` losses come from feeding token by token, after that pass, so
    that methods for decoding and cache policies show their price too.

    Args:
        loaded: the model.
        ids: the text; its last token is only predicted.
        cache: a new cache.
        scored: tokens whose loss is wanted; their logits are held at once.
        steps: of them, those that are read one by one.

    Shapes:
        -> nats float32 [scored], on the CPU

    Raises:
        InputError: a text too short for so many.
    """
    first = len(ids) - 1 - steps
    if not 0 <= steps <= scored or first < 1 or scored > len(ids) - 1:
        raise InputError(f"losses: {scored} scored tokens, {steps} one by one, do not fit in {len(ids)} tokens")
    device = loaded.device
    text = torch.tensor([list(ids)], device=device)
    found = []
    started = now(device)
    kept = scored - steps
    logits = loaded.model(text[:, :first], past_key_values=cache, use_cache=True, logits_to_keep=max(kept, 1)).logits
    if kept:
        targets = text[0, first + 1 - kept : first + 1]
        found += [_nats(*part) for part in zip(logits[0].split(ROWS), targets.split(ROWS), strict=True)]
    read = now(device)
    for at in range(first, len(ids) - 1):
        logits = loaded.model(text[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        found.append(_nats(logits[0, -1:], text[0, at + 1 : at + 2]))
    ended = now(device)
    took = Answer("", steps, read - started, (ended - read) / steps if steps else None, held(cache))
    return torch.cat(found), took


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none").cpu()


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
