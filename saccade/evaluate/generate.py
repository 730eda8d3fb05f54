"""Timed answers: greedy decoding with any transformers cache, first token and further tokens timed apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from saccade.core.errors import InputError
from saccade.core.plan import Plan
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
        ttft_s: seconds from the prompt to the first token.
        tpot_s: seconds per further token; None where there was only one.
        kv_bytes: bytes of keys and values that were held at the end.
    """

    text: str
    tokens: int
    ttft_s: float
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


@torch.inference_mode()
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
    if not len(ids) or max_new_tokens < 1:
        raise InputError(f"answer: needs a prompt and max_new_tokens >= 1, got {len(ids)} and {max_new_tokens}")
    model, device = loaded.model, loaded.device
    end = _ends(model)
    step = torch.tensor([list(ids)], device=device)
    said: list[int] = []
    count, text, ended = 0, "", False
    first = started = now(device)
    while count < max_new_tokens and not (ended and count >= least):
        logits = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        step = logits[:, -1:].argmax(-1)
        token, count = int(step), count + 1
        if count == 1:
            first = now(device)
        ended = ended or token in end
        if not ended:
            said.append(token)
            text = loaded.tokenizer.decode(said)
            ended = bool(stop) and stop in text
    last = now(device)
    return Answer(
        text=(text.split(stop, 1)[0] if stop else text).strip(),
        tokens=count,
        ttft_s=first - started,
        tpot_s=(last - first) / (count - 1) if count > 1 else None,
        kv_bytes=held(cache),
    )


def held(cache: Any) -> int:
    """Bytes of keys and values in a cache, ours or transformers'."""
    return int(cache.bytes()) if hasattr(cache, "bytes") else sum(cache_bytes(layer) for layer in cache.layers)


def _ends(model: Any) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
