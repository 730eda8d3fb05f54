"""What to draw of a watched run, and the words that say how to read it."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.plan import Plan
from saccade.evaluate.presets import phases
from saccade.evaluate.trace import SIZE, Trace

MASS = (
    "Each row is a query token, the first at the top; each column is a key token it may look at. The darker, the more "
    "of the softmax weight lies there. The blank upper right is the future."
)
READ = (
    "Prefill: each row is a query token, the first at the top; each column is a key token. Dark cells are read, pale "
    "ones in part, blank ones not at all; the upper right is the future."
)
STEPS = "Each row is one generated token, the first at the top; each column is a part of the text before it."
KEPT = (
    "Last token: each row is one head of one layer, the first layer at the top; each column is a part of the text. "
    "Dark is what the head reads when the last token is generated."
)
BLANK = "Nothing is drawn for heads whose method gives the answer itself: it shows no pattern."
LAYER = (
    "Each row is an output token, each column an input token: how much the one depends on the other, the row's "
    "largest at full shade, in a layer with random weights."
)


def phase_of(plan: Plan | None) -> str:
    """What is worth drawing: "prefill", "decode" (steps), or "cache" (what is kept)."""
    used = {"prefill"} if plan is None else phases(plan)
    if "prefill" in used:
        return "prefill"
    return "cache" if "cache" in used else "decode"


def prefill_panel(trace: Trace, layer: int, head: int) -> tuple[str, Tensor]:
    """Queries down, keys across, for one head; blank where a method gave the answer itself and showed no pattern."""
    if layer not in trace.prefill:
        return f"layer {layer}, head {head}: no pattern to draw", torch.zeros(SIZE, SIZE)
    return f"layer {layer}, head {head}", trace.prefill[layer][trace.drawn.index(head)]


def steps_panel(trace: Trace, layer: int, head: int) -> tuple[str, Tensor]:
    """Generated tokens down, keys across, for one head; blank as above."""
    if layer not in trace.steps:
        return f"layer {layer}, head {head}: no pattern to draw", torch.zeros(1, SIZE)
    return f"layer {layer}, head {head}", torch.stack([row[head] for row in trace.steps[layer]])


def kept_panel(trace: Trace) -> tuple[str, Tensor]:
    """All layers and heads down, keys across, when the last token was generated."""
    return "all heads, last token" + ("" if trace.steps else ": no pattern to draw"), trace.last_step()


def reading(trace: Trace, plan: Plan | None) -> str:
    """What was measured, in a sentence."""
    if plan is None:
        return "Dense attention: everything is read."
    parts = []
    for phase in ("prefill", "decode"):
        share, mass = trace.density(phase), trace.meter.kept(phase)
        if share is not None:
            # what a policy evicted has no weight any more that could be missed
            gone = mass is None or (phase == "decode" and plan is not None and "cache" in phases(plan))
            kept = "" if gone else f" and keeps {mass:.1%} of the attention weight"
            parts.append(f"{phase} reads {share:.1%} of what dense attention reads{kept}")
    said = "; ".join(parts)
    return f"{said[:1].upper()}{said[1:]}." if said else "Nothing was measured: the method answers by itself."
