"""Greedy answers with any transformers cache: one prompt by itself and timed, or prompts of one length together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from saccade.core.plan import Plan
from saccade.evaluate.dialogue import Dialogue, Ending, hold
from saccade.evaluate.model import Loaded
from saccade.hf.attach import attach
from saccade.hf.cache import cache_bytes
from saccade.methods.apply import Seen

LEAST = 8  # tokens that are always generated, so that a short answer still gives a time per token


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt, and what that took.

    Args:
        text: generated text, without what follows the stop.
        tokens: tokens that were generated, those after the stop included.
        ttft_s: seconds from the prompt to the first token; None where prompts were read together.
        tpot_s: seconds per further token; None where there was only one, or where prompts were read together.
        kv_bytes: bytes of keys and values that were held at the end, this prompt's share of them.
    """

    text: str
    tokens: int
    ttft_s: float | None
    tpot_s: float | None
    kv_bytes: int


@contextmanager
def serving(loaded: Loaded, plan: Plan | None, watch: Callable[[Seen], None] | None = None) -> Iterator[Any]:
    """Put a plan on a model for a while; gives a function (length) -> new cache.

    Args:
        loaded: the model.
        plan: a plan, or None for stock transformers: sdpa and DynamicCache, nothing of saccade in the way.
        watch: given to the session, for measuring; needs a plan.
    """
    if plan is None:
        yield lambda length=0: DynamicCache(config=loaded.model.config)
        return
    with attach(loaded.model, plan) as session:
        session.watch = watch
        yield session.cache


def answer(
    loaded: Loaded,
    ids: Sequence[int],
    cache: Any,
    *,
    max_new_tokens: int = 24,
    stop: str = "\n",
    least: int = LEAST,
) -> Answer:
    """Answer one prompt greedily: one prefill, then token by token until the stop text or the end of sequence.

    Args:
        loaded: the model.
        ids: tokens of the prompt.
        cache: a new cache, from `serving`.
        max_new_tokens: most tokens to generate.
        stop: text that ends the answer; "" = only the end-of-sequence token does.
        least: tokens generated in any case, for the clock; what comes after the stop is not part of the answer.
    """
    return together(loaded, [ids], cache, max_new_tokens=max_new_tokens, stop=stop, least=least)[0]


def together(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    cache: Any,
    *,
    max_new_tokens: int = 24,
    stop: str = "\n",
    least: int = 1,
) -> list[Answer]:
    """Answer prompts of equally many tokens as one batch, until the last of them has ended; arguments as in `answer`.

    A row that has ended goes on beside the others, and what it says then is thrown away, so each text is what the
    prompt alone would get, but for the rounding of a larger matrix product. Nothing is timed where there are two or
    more: their times are not those of one prompt.

    Raises:
        InputError: no prompt, or prompts of different lengths.
    """
    ending = Ending.of(loaded, max_new_tokens, stop)
    rows = [Dialogue([ids], ending) for ids in prompts]
    clock = [now(loaded.device), *hold(loaded, rows, cache, min(least, max_new_tokens))]
    return replies(rows, clock, cache, len(clock) - 1)


def replies(rows: Sequence[Dialogue], clock: Sequence[float], cache: Any, tokens: int | None = None) -> list[Answer]:
    """The first answer of each dialogue, and what it took: times where there is one dialogue, none where more.

    Args:
        rows: dialogues that were held together.
        clock: seconds when they started, and when each call of the model was done.
        cache: what they were held in; its bytes are those at the end of the dialogues.
        tokens: count so many tokens, those after the stop included (None: up to the end of the answer).
    """
    alone, kept = len(rows) == 1, held(cache) // len(rows)
    found = []
    for row in rows:
        count = len(row.said[0]) if tokens is None else tokens
        first, last = clock[row.first], clock[row.first + count - 1]
        found.append(
            Answer(
                text=row.texts[0],
                tokens=count,
                ttft_s=first - clock[0] if alone else None,
                tpot_s=(last - first) / (count - 1) if alone and count > 1 else None,
                kv_bytes=kept,
            )
        )
    return found


def untimed(found: Answer) -> Answer:
    """The answer without its times."""
    return replace(found, ttft_s=None, tpot_s=None)


def held(cache: Any) -> int:
    """Bytes of keys and values in a cache, ours or transformers'."""
    return int(cache.bytes()) if hasattr(cache, "bytes") else sum(cache_bytes(layer) for layer in cache.layers)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
