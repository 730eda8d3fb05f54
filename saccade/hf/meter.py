"""Meter: what a session really looked at: density with selection's cost, and the attention mass that was kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Full, Pattern, per_head
from saccade.methods.apply import Seen

ROWS = 64  # queries at the end of a call for which the kept mass is measured: its cost is ROWS x M


@dataclass
class Layer:
    """Running sums for one layer and phase: pairs read, scored to choose, and of answers without a pattern both."""

    pairs: float = 0.0
    estimate: float = 0.0
    whole: float = 0.0
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
                layer.whole += seen.estimate
                layer.allowed += self._allowed(seen)
            return
        layer.pairs += seen.pattern.pairs(call)
        layer.estimate += seen.estimate
        layer.allowed += self._allowed(seen)
        if self.mass:
            layer.mass.append(self._mass(seen))
        if self.keep:
            layer.pattern, layer.seen = seen.pattern, seen

    def density(self, phase: str, layer: int | None = None) -> float | None:
        """Pairs visited and scored for selection, as a share of dense causal attention's; None if nothing was seen."""
        mine = [v for (p, at), v in self.layers.items() if p == phase and layer in (None, at)]
        allowed = sum(v.allowed for v in mine)
        return None if not allowed else (sum(v.pairs + v.estimate + v.whole for v in mine)) / allowed

    def estimated(self, phase: str) -> float | None:
        """What choosing costs of `density`; None if nothing was seen, or where a method without a pattern keeps it."""
        mine = [v for (p, _), v in self.layers.items() if p == phase]
        allowed = sum(v.allowed for v in mine)
        return None if not allowed or any(v.whole for v in mine) else sum(v.estimate for v in mine) / allowed

    def kept(self, phase: str) -> float | None:
        """Mean attention mass on the chosen keys, over layers, heads and the last 64 queries."""
        mass = [m.mean() for (p, _), v in self.layers.items() if p == phase for m in v.mass]
        return float(torch.stack(mass).mean()) if mass else None

    def kept_low(self, phase: str, share: float = 0.05) -> float | None:
        """The 5th percentile of that mass: of all queries in all heads of all layers, 5 % keep less."""
        mass = [m.flatten() for (p, _), v in self.layers.items() if p == phase for m in v.mass]
        return float(torch.cat(mass).quantile(share)) if mass else None

    def _mass(self, seen: Seen) -> Tensor:
        return kept_mass(seen)

    @staticmethod
    def _allowed(seen: Seen) -> float:
        # an evicted store is compared with all tokens of the sequence, not with what is left of them
        call = seen.call
        if call.q_pos is None:
            return Full().pairs(call)
        return float((call.q_pos + 1).clamp_min(0).sum()) * call.shape.H * (call.shape.B // call.q_pos.shape[0])


def kept_mass(seen: Seen, keys: Tensor | None = None) -> Tensor:
    """Share of the softmax mass that lies on the pattern's keys, [B,H,last 64 queries].

    Args:
        seen: what was looked at.
        keys: all keys of the sequence [B,G,tokens,D], where the store has dropped some; None = what is stored is all.
    """
    call, q, k, pattern = seen.call, seen.q, seen.k, seen.pattern
    assert pattern is not None
    N = call.shape.N
    rows = torch.arange(max(0, N - ROWS), N, device=q.device)
    q_pos, k_pos = call.positions(q.device)
    scores = _scores(q[:, :, rows], k, q_pos[:, rows], k_pos, call)
    chosen = scores.masked_fill(~pattern.mask(call, rows), float("-inf"))
    if keys is not None:
        scores = _scores(q[:, :, rows], keys, q_pos[:, rows], torch.arange(keys.shape[2], device=q.device), call)
        if seen.bias is not None:
            # a slot that stands for dropped tokens is none of them
            folded = per_head(seen.bias, call)[:, :, None] != 0
            chosen = chosen.masked_fill(folded, float("-inf"))
    return torch.exp(chosen.logsumexp(-1) - scores.logsumexp(-1))


def _scores(q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, call: Call) -> Tensor:
    """Logits [B,H,n,M] of queries [B,H,n,D] at q_pos [1|B,n], -inf where causality or padding hides a key."""
    B, H, n, D = q.shape
    G, M = k.shape[1:3]
    scores = ((q * call.softmax_scale(D)).reshape(B, G, -1, D) @ k.transpose(-1, -2)).view(B, H, n, M).float()
    where = k_pos[None, None, None] if k_pos.ndim == 1 else per_head(k_pos, call)[:, :, None, :]
    return scores.masked_fill(~call.sees(q_pos[:, None, :, None], where), float("-inf"))
