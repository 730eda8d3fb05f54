"""Density and kept mass of each layer and head, in `heads.jsonl` beside the rows: which one reads how much.

From the watched run of a cell, that of its first sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from saccade.evaluate.samples import Cell
from saccade.hf.meter import Glance, Meter

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

    _heads: dict[tuple[str, int, int], Sums] = field(default_factory=dict, init=False, repr=False)

    def _take(self, glance: Glance) -> None:
        super()._take(glance)
        seen = glance.seen
        if seen.pattern is None:
            return
        call, phase = seen.call, glance.phase
        mine = [self._heads.setdefault((phase, call.layer, head), Sums()) for head in call.heads]
        self._deferred.add(glance.pairs, partial(_add_pairs, mine, 0.0 if math.isnan(seen.estimate) else seen.estimate))
        self._deferred.add(glance.allowed, partial(_add_allowed, mine))
        if self.mass:
            self._deferred.add(self._layers[phase, call.layer].mass[-1].mean((0, 2)), partial(_add_mass, mine))

    def grid(self, phase: str, what: str, layers: int, heads: int) -> list[list[float | None]] | None:
        """Layers down, heads across, "density" or "mass"; None where nothing was seen."""
        self._deferred.settle()
        rows = [[self._value(phase, what, layer, head) for head in range(heads)] for layer in range(layers)]
        return rows if any(value is not None for row in rows for value in row) else None

    def _value(self, phase: str, what: str, layer: int, head: int) -> float | None:
        sums = self._heads.get((phase, layer, head))
        if sums is None or not sums.allowed or (what == "mass" and not sums.mass):
            return None
        return round(sum(sums.mass) / len(sums.mass) if what == "mass" else sums.pairs / sums.allowed, 4)


def _add_pairs(heads: Sequence[Sums], estimate: float, pairs: Sequence[float]) -> None:
    for sums, found in zip(heads, pairs, strict=True):
        sums.pairs += found + estimate / len(heads)


def _add_allowed(heads: Sequence[Sums], allowed: Sequence[float]) -> None:
    for sums in heads:
        sums.allowed += allowed[0] / len(heads)


def _add_mass(heads: Sequence[Sums], mass: Sequence[float]) -> None:
    for sums, found in zip(heads, mass, strict=True):
        sums.mass.append(found)


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
