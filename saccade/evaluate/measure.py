"""Measure one method on prompts: answers alone with their times, or together without; losses; what was looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.fidelity import sparse_phase
from saccade.evaluate.generate import Answer, answer, held, now, serving, together, untimed
from saccade.evaluate.model import Loaded
from saccade.evaluate.presets import phases
from saccade.evaluate.trace import Trace

if TYPE_CHECKING:
    from saccade.evaluate.tasks.base import Outcome, Reading, Sample

WARM = 256  # tokens of the run that is not timed
ROWS = 1024  # tokens whose logits are turned to float32 at once

T = TypeVar("T")


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


def answers_together(
    loaded: Loaded,
    plan: Plan | None,
    prompts: Sequence[Sequence[int]],
    batch: int,
    *,
    max_new_tokens: int = 24,
    stop: str = "\n",
) -> tuple[list[Answer], int]:
    """The same texts as `answers`, up to `batch` prompts of one length in a pass; nothing is timed.

    Returns:
        The answers in the order of the prompts, and the most that were read together: fewer where memory ran out.
    """
    with serving(loaded, plan) as cache:

        def read(at: list[int]) -> list[Answer]:
            chosen = [prompts[i] for i in at]
            found = together(loaded, chosen, cache(len(chosen[0])), max_new_tokens=max_new_tokens, stop=stop)
            # one that was left over is not timed either: some times among others would mislead
            return [untimed(one) for one in found]

        return in_batches([len(ids) for ids in prompts], batch, read)


def outcomes(
    loaded: Loaded, plan: Plan | None, task: Reading, samples: Sequence[Sample], batch: int = 1
) -> tuple[list[Outcome], int]:
    """Let a task read its samples by itself, each in new caches; together where the task can and `batch` is above 1.

    Returns:
        What came of each, and the most that were read together.
    """
    with serving(loaded, plan) as cache:
        if batch > 1 and hasattr(task, "run_together"):
            sizes = [len(sample.ids) for sample in samples]
            return in_batches(sizes, batch, lambda at: task.run_together(loaded, cache, [samples[i] for i in at]))
        answer(loaded, samples[0].ids[:WARM], cache(WARM), max_new_tokens=2)
        return [task.run(loaded, cache, sample) for sample in samples], 1


def in_batches(sizes: Sequence[int], batch: int, read: Callable[[list[int]], Sequence[T]]) -> tuple[list[T], int]:
    """Read items together whose sizes agree; where the GPU's memory runs out, half as many from then on.

    Args:
        sizes: of each item.
        batch: most items in a pass.
        read: given the numbers of some items, returns what came of each.

    Example:
        >>> in_batches([5, 9, 5, 5], 2, lambda at: [10 * i for i in at])
        ([0, 10, 20, 30], 2)
    """
    found: dict[int, T] = {}
    most = 0
    for size in dict.fromkeys(sizes):
        left = [at for at, own in enumerate(sizes) if own == size]
        while left:
            try:
                found |= dict(zip(left[:batch], read(left[:batch]), strict=True))
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch //= 2
                torch.cuda.empty_cache()
                continue
            most = max(most, min(batch, len(left)))
            left = left[batch:]
    return [found[at] for at in range(len(sizes))], most


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
    nats, took = losses_together(loaded, [ids], cache, scored=scored, steps=steps)
    return nats[0], took


@torch.inference_mode()
def losses_together(
    loaded: Loaded, texts: Sequence[Sequence[int]], cache: Any, *, scored: int, steps: int = 0
) -> tuple[Tensor, Answer]:
    """`losses` of texts of equally many tokens, read as one batch; timed only where there is one.

    Shapes:
        -> nats float32 [texts, scored], on the CPU
    """
    sizes = {len(ids) for ids in texts}
    total = min(sizes, default=0)
    first = total - 1 - steps
    if len(sizes) != 1 or not 0 <= steps <= scored or first < 1 or scored > total - 1:
        raise InputError(
            f"losses: {scored} scored tokens, {steps} one by one, do not fit in {total} tokens of each of {len(texts)} "
            f"texts of {len(sizes)} lengths"
        )
    device, rows = loaded.device, len(texts)
    text = torch.tensor([list(ids) for ids in texts], device=device)
    found = []
    started = now(device)
    kept = scored - steps
    logits = loaded.model(text[:, :first], past_key_values=cache, use_cache=True, logits_to_keep=max(kept, 1)).logits
    if kept:
        targets = text[:, first + 1 - kept : first + 1]
        found += [_nats(*part) for part in zip(logits.split(ROWS, 1), targets.split(ROWS, 1), strict=True)]
    del logits
    read = now(device)
    for at in range(first, total - 1):
        logits = loaded.model(text[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        found.append(_nats(logits[:, -1:], text[:, at + 1 : at + 2]))
    ended = now(device)
    alone = rows == 1
    took = Answer(
        text="",
        tokens=steps,
        ttft_s=read - started if alone else None,
        tpot_s=(ended - read) / steps if steps and alone else None,
        kv_bytes=held(cache) // rows,
    )
    return torch.cat(found, 1), took


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).cpu()


def times(found: Sequence[Answer]) -> dict[str, Any]:
    """Medians of the times, and the largest cache: ttft_s, tpot_s, kv_bytes. No times where none was read alone."""
    firsts = [a.ttft_s for a in found if a.ttft_s is not None]
    steps = [a.tpot_s for a in found if a.tpot_s is not None]
    return {
        "ttft_s": round(median(firsts), 4) if firsts else None,
        "tpot_s": round(median(steps), 5) if steps else None,
        "kv_bytes": max(a.kv_bytes for a in found),
    }


def looked(found: Trace | None, plan: Plan | None) -> dict[str, Any]:
    """Density and mass of the phase that a plan makes sparse (prefill where it is both), and both densities.

    Stock attention is 1.0 by definition. What a policy evicted has no weight any more that could be missed, so there is
    no mass then.
    """
    if plan is None or found is None:
        return {"density": 1.0, "mass": 1.0, "density_prefill": 1.0, "density_decode": 1.0}
    phase = sparse_phase(plan, found.meter)
    gone = phase == "decode" and "cache" in phases(plan)
    prefill, decode = found.density("prefill"), found.density("decode")
    return {
        "density": _short(decode if phase == "decode" else prefill),
        "mass": None if gone else _short(found.meter.kept(phase)),
        "density_prefill": _short(prefill),
        "density_decode": _short(decode),
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
