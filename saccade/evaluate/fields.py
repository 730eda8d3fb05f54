"""What a row says beside scores and times: one watched reading and one clocked reading of a prompt under a plan.

Definitions are where the figures are made: `fidelity`, `look`, `costs`, `waterfall`, `saccade.hf.meter`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from saccade.core.plan import Plan
from saccade.evaluate.costs import ceiling, peak
from saccade.evaluate.fidelity import Dense, fidelity
from saccade.evaluate.look import Look
from saccade.evaluate.model import Loaded
from saccade.evaluate.waterfall import waterfall

FIELDS = (
    *("density", "mass", "mass_low", "estimate", "output_error"),
    *("kl_answer", "kl_other", "agree_answer", "agree_other"),
    *("read_bytes", "peak_bytes", "ceiling", "waterfall"),
)


@dataclass(frozen=True)
class Found:
    """The fields of a row by name, None where not known, and what was watched (None for stock attention)."""

    row: dict[str, Any]
    look: Look | None


def measures(loaded: Loaded, plan: Plan | None, dense: Dense, *, clocked: bool = True) -> Found:
    """Measure a plan on one prompt, batch 1.

    Costs a prefill and the dense answer's steps (at least 8) under watch, and as much again under a clock; on a GPU one
    more reading before the clock, so that all is compiled.

    Args:
        loaded: the model; nothing else may run on its device meanwhile.
        plan: a plan, or None for stock transformers, which is its own measure.
        dense: from `saccade.evaluate.fidelity.read_dense`, once for all methods.
        clocked: also run for the waterfall and for the peak of memory.
    """
    near = fidelity(loaded, plan, dense)
    look, tokens = near.look, len(dense.ids)
    row: dict[str, Any] = dict.fromkeys(FIELDS)
    row |= {name: getattr(near, name) for name in FIELDS if hasattr(near, name)}
    if look is None:
        row |= {"density": 1.0, "estimate": 0.0, "ceiling": 1.0}
    else:
        row |= {"density": look.density(near.phase), "estimate": look.estimated(near.phase)}
        row["ceiling"] = ceiling(loaded, tokens, dense.widths, look)
    row["read_bytes"] = None if near.read_bytes is None else round(near.read_bytes)
    if clocked:
        row |= clock(loaded, plan, dense)
    return Found({name: _plain(value) for name, value in row.items()}, look)


def clock(loaded: Loaded, plan: Plan | None, dense: Dense) -> dict[str, Any]:
    """The clocked reading alone: `waterfall` and `peak_bytes`."""
    with peak(loaded.device) as most:
        spent = waterfall(loaded, plan, dense.ids, steps=max(1, len(dense.tokens) - 1))
    return {"waterfall": _plain(spent), "peak_bytes": most.bytes}


def _plain(value: Any) -> Any:
    """Numbers as JSON knows them, five digits of each."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None
