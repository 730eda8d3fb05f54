"""Density and kept mass of each layer and head, in `heads.jsonl` beside the rows: which one reads how much.

From the watched run of a cell, that of its first sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from saccade.evaluate.samples import Cell
from saccade.hf.meter import Meter
from saccade.methods.apply import Seen

FILE = "heads.jsonl"


@dataclass
class Sums:
    """Running sums of one head."""

    pairs: float = 0.0
    allowed: float = 0.0
    mass: list[float] = field(default_factory=list)


@dataclass
class HeadMeter(Meter):
    """A meter that also keeps each head apart; what choosing costs a layer is spread evenly over its heads.

    Example:
        >>> HeadMeter().grid("prefill", "density", 2, 2) is None
        True
    """

    heads: dict[tuple[str, int, int], Sums] = field(default_factory=dict)

    def __call__(self, seen: Seen) -> None:
        """Take note of one attend."""
        super().__call__(seen)
        if seen.pattern is None:
            return
        call = seen.call
        phase = "prefill" if call.shape.N > 16 or call.shape.N == call.shape.M else "decode"
        mass = self.layers[phase, call.layer].mass[-1].mean((0, 2)).tolist() if self.mass else None
        share, count = call.shape.H // call.shape.G, len(call.heads)
        estimate = 0.0 if math.isnan(seen.estimate) else seen.estimate / count
        for at, head in enumerate(call.heads):
            sums = self.heads.setdefault((phase, call.layer, head), Sums())
            one = call.take((at,), (at // share,))
            sums.pairs += seen.pattern.heads([at], call).pairs(one) + estimate
            sums.allowed += self._allowed(seen) / count
            if mass is not None:
                sums.mass.append(mass[at])

    def grid(self, phase: str, what: str, layers: int, heads: int) -> list[list[float | None]] | None:
        """Layers down, heads across, "density" or "mass"; None where nothing was seen."""
        rows = [[self._value(phase, what, layer, head) for head in range(heads)] for layer in range(layers)]
        return rows if any(value is not None for row in rows for value in row) else None

    def _value(self, phase: str, what: str, layer: int, head: int) -> float | None:
        sums = self.heads.get((phase, layer, head))
        if sums is None or not sums.allowed or (what == "mass" and not sums.mass):
            return None
        return round(sum(sums.mass) / len(sums.mass) if what == "mass" else sums.pairs / sums.allowed, 4)


def lines_of(cell: Cell, meter: HeadMeter, layers: int, heads: int) -> list[dict[str, Any]]:
    """A line per phase in which anything was seen."""
    method, task, length = cell
    found = []
    for phase in ("prefill", "decode"):
        density, mass = (meter.grid(phase, what, layers, heads) for what in ("density", "mass"))
        if density is not None:
            head = {"method": method, "task": task, "length": length, "phase": phase}
            found.append(head | {"density": density, "mass": mass})
    return found
