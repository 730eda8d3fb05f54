"""Waterfall: the time of one prefill and of decoding steps, split in choosing, attending, moving and the rest.

A clock is put on a session for one run. Parts follow each other without gaps, so they sum to the whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saccade.core.clock import PARTS, Clock
from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.model import Loaded
from saccade.hf.attach import attach

WARM = 256  # tokens of the run that is not measured, on a CPU
CLOCKED = "saccade_clocked_sdpa"


class Laps:
    """A clock of laps; on a GPU they are events of the stream, and nothing waits before `seconds`.

    A stretch in which the device had nothing to do, because the host was late, belongs to the lap that ends it.

    Args:
        device: where the work runs.

    Example:
        >>> laps = Laps(torch.device("cpu"))
        >>> laps.start()
        >>> laps.lap("attend")
        >>> sorted(laps.seconds())
        ['attend', 'copy', 'rest', 'select']
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Forget all laps and begin."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks = [("", self._now())]

    def lap(self, part: str) -> None:
        """The end of a stretch of time that was spent on this part."""
        if part not in PARTS:
            raise InputError(f"lap: {part!r} is none of {', '.join(PARTS)}")
        self.marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since the start; their sum is the time from the start to the last lap."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            found[part] += after - before if isinstance(after, float) else before.elapsed_time(after) / 1e3
        return found

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


@torch.inference_mode()
def waterfall(
    loaded: Loaded, plan: Plan | None, ids: Sequence[int], *, steps: int = 8, warm: int | None = None
) -> dict[str, dict[str, float]]:
    """Seconds of a prefill with its first token, and of one decoding step, in each part.

    "select" is choosing where to look or what stays, "attend" attention (all that a method does which gives the answer
    itself), "copy" appending, gathering and moving keys and values, "rest" the model around it. Costs a short run to
    warm up, a prefill and the steps.

    Args:
        loaded: the model.
        plan: a plan, or None for stock transformers: its own attention and DynamicCache.
        ids: tokens of the prompt.
        steps: decoded tokens; "decode" is the mean of them, the first one included.
        warm: tokens of the run before; None = 256 on a CPU, elsewhere all, as the length decides what is compiled.

    Raises:
        InputError: an empty prompt, or no step.
    """
    if not len(ids) or steps < 1:
        raise InputError(f"waterfall: needs a prompt and steps >= 1, got {len(ids)} and {steps}")
    if warm is None:
        warm = WARM if loaded.device.type == "cpu" else len(ids)
    laps = Laps(loaded.device)
    with _clocked(loaded, plan, laps) as cache:
        if warm:
            _run(loaded, ids[:warm], cache(min(warm, len(ids))), laps, 2)
        prefill, decode = _run(loaded, ids, cache(len(ids)), laps, steps)
    return {"prefill": prefill, "decode": {part: spent / steps for part, spent in decode.items()}}


def _run(loaded: Loaded, ids: Sequence[int], cache: Any, laps: Laps, steps: int) -> tuple[dict[str, float], ...]:
    text = torch.tensor([list(ids)], device=loaded.device)
    found = []
    for count in (1, steps):
        laps.start()
        for _ in range(count):
            logits = loaded.model(text, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            text = logits[:, -1:].argmax(-1)
            laps.lap("rest")
        found.append(laps.seconds())
    return tuple(found)


@contextmanager
def _clocked(loaded: Loaded, plan: Plan | None, laps: Clock) -> Iterator[Any]:
    """A plan at work with a clock, or stock transformers with one around its attention and its cache."""
    if plan is not None:
        with attach(loaded.model, plan) as session:
            session.clock = laps
            yield session.cache
        return

    config = loaded.model.config
    text = config.get_text_config()
    before = text._attn_implementation
    dense = ALL_ATTENTION_FUNCTIONS["sdpa"]

    class Clocked(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            laps.lap("rest")
            held = super().update(*args, **kwargs)
            laps.lap("copy")
            return held

    def attention(*args: Any, **kwargs: Any) -> Any:
        laps.lap("rest")
        out = dense(*args, **kwargs)
        laps.lap("attend")
        return out

    def use(name: str) -> None:
        loaded.model.set_attn_implementation(name if text is config else {"text_config": name})

    AttentionInterface.register(CLOCKED, attention)
    AttentionMaskInterface.register(CLOCKED, sdpa_mask)
    use(CLOCKED)
    try:
        yield lambda length=0: Clocked(config=config)
    finally:
        use(before)
