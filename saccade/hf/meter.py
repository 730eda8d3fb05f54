"""Meter: what a session really looked at: density with selection's cost, and the attention mass that was kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.core.pattern import Full, Pattern, per_head
from saccade.methods.apply import Seen

ROWS = 64  # queries at the end of a call for which the kept mass is measured: its cost is ROWS x M


@dataclass
class Layer:
    """Running sums for one layer and phase."""

    pairs: float = 0.0
    estimate: float = 0.0
    allowed: float = 0.0
    mass: list[Tensor] = field(default_factory=list)
    pattern: Pattern | None = None
    seen: Seen | None = None


@dataclass
class Meter:
    """Collects from a session: `session.watch = meter`. Counting costs time, so measure and time in separate runs.

    Args:
        mass: also measure the share of dense attention's mass on the chosen keys, for the last 64 queries of a call.
        keep: keep the last pattern of each layer, to draw it.

    Example:
        >>> Meter().density("prefill") is None
        True
    """

    mass: bool = True
    keep: bool = False
    layers: dict[tuple[str, int], Layer] = field(default_factory=dict)

    def __call__(self, seen: Seen) -> None:
        """Take note of one attend."""
        call = seen.call
        phase = "prefill" if call.shape.N > 16 or call.shape.N == call.shape.M else "decode"
        layer = self.layers.setdefault((phase, call.layer), Layer())
        if seen.pattern is None:
            if not math.isnan(seen.estimate):
                layer.estimate += seen.estimate
                layer.allowed += self._allowed(seen)
            return
        layer.pairs += seen.pattern.pairs(call)
        layer.estimate += seen.estimate
        layer.allowed += self._allowed(seen)
        if self.mass:
            layer.mass.append(kept_mass(seen))
        if self.keep:
            layer.pattern, layer.seen = seen.pattern, seen

    def density(self, phase: str, layer: int | None = None) -> float | None:
        """Pairs visited and scored for selection, as a share of dense causal attention's; None if nothing was seen."""
        mine = [v for (p, at), v in self.layers.items() if p == phase and layer in (None, at)]
        allowed = sum(v.allowed for v in mine)
        return None if not allowed else (sum(v.pairs + v.estimate for v in mine)) / allowed

    def kept(self, phase: str) -> float | None:
        """Mean attention mass on the chosen keys, over layers, heads and the last 64 queries."""
        mass = [m.mean() for (p, _), v in self.layers.items() if p == phase for m in v.mass]
        return float(torch.stack(mass).mean()) if mass else None

    @staticmethod
    def _allowed(seen: Seen) -> float:
        # an evicted store is compared with all tokens of the sequence, not with what is left of them
        call = seen.call
        if call.q_pos is None:
            return Full().pairs(call)
        return float((call.q_pos + 1).clamp_min(0).sum()) * call.shape.H * (call.shape.B // call.q_pos.shape[0])


def kept_mass(seen: Seen) -> Tensor:
    """Share of the softmax mass over all stored keys that lies on the pattern's keys, [B,H,last 64 queries]."""
    call, q, k, pattern = seen.call, seen.q, seen.k, seen.pattern
    assert pattern is not None
    B, H, G, N, M = call.shape
    rows = torch.arange(max(0, N - ROWS), N, device=q.device)
    scores = (q[:, :, rows] * call.softmax_scale(q.shape[3])).reshape(B, G, -1, q.shape[3]) @ k.transpose(-1, -2)
    q_pos, k_pos = call.positions(q.device)
    seen_keys = call.sees(q_pos[:, None, rows, None], per_head(k_pos, call)[:, :, None, :])
    scores = scores.view(B, H, len(rows), M).float().masked_fill(~seen_keys, float("-inf"))
    chosen = scores.masked_fill(~pattern.mask(call, rows), float("-inf"))
    return torch.exp(chosen.logsumexp(-1) - scores.logsumexp(-1))
