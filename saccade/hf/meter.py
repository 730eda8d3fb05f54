"""Meter: what a session really looked at: density with selection's cost, and the attention mass that was kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Full, Pattern, per_head
from saccade.hf.deferred import Deferred
from saccade.methods.apply import Seen, phase_of

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

    def add(self, name: str, numbers: Sequence[float]) -> None:
        """Add numbers to the sum of this name."""
        setattr(self, name, getattr(self, name) + sum(numbers))


class Glance:
    """One attend under a meter: what several figures need of it is made once, and stays on the device."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.phase = phase_of(seen.call.shape.N, seen.call.shape.M - seen.call.shape.N)

    @cached_property
    def mask(self) -> Tensor:
        """The pairs of the last 64 queries, [B,H,rows,M]."""
        assert self.seen.pattern is not None
        N = self.seen.call.shape.N
        return self.seen.pattern.mask(self.seen.call, torch.arange(max(0, N - ROWS), N, device=self.seen.q.device))

    @cached_property
    def pairs(self) -> Tensor:
        """Pairs that each head reads, [H]."""
        call, pattern = self.seen.call, self.seen.pattern
        assert pattern is not None
        known = isinstance(pattern, Full) and call.contiguous
        return pattern.counts(call) if known or call.shape.N > ROWS else self.mask.sum((0, 2, 3)).double()

    @cached_property
    def allowed(self) -> Tensor | float:
        """Pairs of dense attention; an evicted store's are those with all tokens, not with what is left of them."""
        call = self.seen.call
        if call.q_pos is None:
            return Full().pairs(call)
        return (call.q_pos + 1).clamp_min(0).sum().double() * (call.shape.H * (call.shape.B // call.q_pos.shape[0]))


@dataclass
class Meter:
    """Collects from a session: `session.watch = meter`. Counting costs time, so measure and time in separate runs.

    While the model runs no number is read from the device; they come when they are asked for.

    Args:
        mass: also measure the share of dense attention's mass on the chosen keys, for the last 64 queries of a call.
        keep: keep the last pattern of each layer, to draw it.

    Example:
        >>> Meter().density("prefill") is None
        True
    """

    mass: bool = True
    keep: bool = False
    _layers: dict[tuple[str, int], Layer] = field(default_factory=dict, init=False, repr=False)
    _deferred: Deferred = field(default_factory=Deferred, init=False, repr=False)

    @property
    def layers(self) -> dict[tuple[str, int], Layer]:
        """The sums by phase and layer."""
        self._deferred.settle()
        return self._layers

    def __call__(self, seen: Seen) -> None:
        """Take note of one attend."""
        self._take(Glance(seen))

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
        mass = [m.mean() for (p, _), v in self._layers.items() if p == phase for m in v.mass]
        return float(torch.stack(mass).mean()) if mass else None

    def kept_low(self, phase: str, share: float = 0.05) -> float | None:
        """The 5th percentile of that mass: of all queries in all heads of all layers, 5 % keep less."""
        mass = [m.flatten() for (p, _), v in self._layers.items() if p == phase for m in v.mass]
        return float(torch.cat(mass).quantile(share)) if mass else None

    def _take(self, glance: Glance) -> None:
        seen = glance.seen
        layer = self._layers.setdefault((glance.phase, seen.call.layer), Layer())
        if seen.pattern is None:
            if not math.isnan(seen.estimate):
                layer.whole += seen.estimate
                self._deferred.add(glance.allowed, partial(layer.add, "allowed"))
            return
        layer.estimate += seen.estimate
        self._deferred.add(glance.pairs, partial(layer.add, "pairs"))
        self._deferred.add(glance.allowed, partial(layer.add, "allowed"))
        if self.mass:
            layer.mass.append(self._mass(glance))
        if self.keep:
            layer.pattern, layer.seen = seen.pattern, seen

    def _mass(self, glance: Glance) -> Tensor:
        seen = glance.seen
        if isinstance(seen.pattern, Full):
            return torch.ones(seen.q.shape[0], seen.q.shape[1], min(seen.q.shape[2], ROWS), device=seen.q.device)
        return kept_mass(seen, mask=glance.mask)


def kept_mass(seen: Seen, keys: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Share of the softmax mass that lies on the pattern's keys, [B,H,last 64 queries].

    Args:
        seen: what was looked at.
        keys: all keys of the sequence [B,G,tokens,D], where the store has dropped some; None = what is stored is all.
        mask: the pattern's pairs of these queries, where they are known.
    """
    call, q, k = seen.call, seen.q, seen.k
    last = slice(max(0, call.shape.N - ROWS), None)
    q_pos, k_pos = call.positions(q.device)
    q, q_pos = q[:, :, last], q_pos[:, last]
    scores = _scores(q, k, q_pos, k_pos, call)
    chosen = scores.masked_fill(~(Glance(seen).mask if mask is None else mask), float("-inf"))
    if keys is not None:
        scores = _scores(q, keys, q_pos, torch.arange(keys.shape[2], device=q.device), call)
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
