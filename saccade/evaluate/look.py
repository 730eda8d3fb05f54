"""Look: a meter that also compares every attention output with dense attention, and counts what decoding reads.

Outputs are compared layer by layer on the queries, keys and values that the method's run has there: what one layer
adds, without what the layers before it did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from saccade.core.errors import InputError
from saccade.evaluate.costs import bytes_of
from saccade.evaluate.headmap import HeadMeter
from saccade.hf.meter import Glance, kept_mass
from saccade.methods.apply import Seen

ROWS = 64  # of a prefill's queries, so many random ones and the last ones have their attention outputs compared
WEIGHTS = 1 << 25  # attention weights of the comparison that are held at a time


@dataclass
class Look(HeadMeter):
    """Watches one sequence in a cache of ours, from its first token on: `saccade.evaluate.fidelity` asks it.

    Args:
        evicts: a copy of all keys and values is kept, because the store will drop some.

    Attributes:
        beside: bytes of layers that the plan does not serve: a step reads them whole.
    """

    evicts: bool = False
    beside: float = 0.0
    # per (phase, layer, head) the squared norms of difference and dense output
    _errors: dict[tuple[str, int, int], list[float]] = field(default_factory=dict, init=False, repr=False)
    # per layer and its heads, bytes and tokens of decoding
    _read: dict[tuple[int, tuple[int, ...]], list[float]] = field(default_factory=dict, init=False, repr=False)
    _all: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _rows: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def error(self, phase: str, layer: int | None = None, head: int | None = None) -> float | None:
        """Relative L2 error of the outputs, the mean over layers and heads; None where nothing was seen."""
        self._deferred.settle()
        found = [
            math.sqrt(difference / dense) if dense else math.inf if difference else 0.0
            for (p, at, h), (difference, dense) in self._errors.items()
            if p == phase and layer in (None, at) and head in (None, h)
        ]
        return sum(found) / len(found) if found else None

    def step_bytes(self) -> float | None:
        """Bytes read per decoded token, over all layers; None where a method does not say or nothing was decoded."""
        self._deferred.settle()
        if not self._read or any(math.isnan(size) for size, _ in self._read.values()):
            return None
        return self.beside + sum(size / tokens for size, tokens in self._read.values())

    def keys(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """All keys, values and their positions [1, 1|G, tokens] that dense attention would read in this call."""
        if not self.evicts:
            return seen.k, seen.v, seen.call.positions(seen.k.device)[1]
        k, v = self._all[seen.call.layer, seen.call.heads]
        return k, v, torch.arange(k.shape[2], device=k.device)[None, None]

    def _take(self, glance: Glance) -> None:
        seen, call = glance.seen, glance.seen.call
        if call.shape.B != 1:
            raise InputError(f"Look: one sequence at a time, got a batch of {call.shape.B}")
        if self.evicts:
            self._remember(seen)
        super()._take(glance)
        if seen.o is not None:
            mine = [self._errors.setdefault((glance.phase, call.layer, head), [0.0, 0.0]) for head in call.heads]
            self._deferred.add(self._compare(seen), partial(_add_norms, mine))
        if glance.phase == "decode":
            read = self._read.setdefault((call.layer, call.heads), [0.0, 0.0])
            read[1] += call.shape.N
            self._deferred.add(bytes_of(seen, None if seen.pattern is None else glance.mask), partial(_add_bytes, read))

    def _mass(self, glance: Glance) -> Tensor:
        seen = glance.seen
        if self.evicts and not seen.call.contiguous:
            return kept_mass(seen, self.keys(seen)[0], glance.mask)
        return super()._mass(glance)

    def _remember(self, seen: Seen) -> None:
        """Keep the new keys and values; say so where some were never seen."""
        call, N = seen.call, seen.call.shape.N
        at = call.layer, call.heads
        new, old = (seen.k[:, :, -N:], seen.v[:, :, -N:]), self._all.get(at)
        if old is None:
            self._all[at] = new[0].clone(), new[1].clone()
        else:
            self._all[at] = torch.cat((old[0], new[0]), 2), torch.cat((old[1], new[1]), 2)
        check = partial(_check_seen, call.layer, self._all[at][0].shape[2])
        self._deferred.add(float(call.shape.M - 1) if call.q_pos is None else call.q_pos[0, -1], check)
        if old is None and call.q_pos is not None:
            # a store that has already dropped something: better told before the model runs on
            self._deferred.settle()

    def _compare(self, seen: Seen) -> Tensor:
        """Squared norms of (output - dense) and of dense, [H, 2]."""
        assert seen.o is not None
        k, v, k_pos = self.keys(seen)
        q, q_pos, o = seen.q, seen.call.positions(seen.q.device)[0], seen.o
        if seen.call.shape.N > 2 * ROWS:
            rows = self._some(seen.call.shape.N, q.device)
            q, q_pos, o = q[:, :, rows], q_pos[:, rows], o[:, :, rows]
        want = dense_rows(q, k, v, q_pos, k_pos, seen.call.softmax_scale(q.shape[3])).double()
        return torch.stack(((o.double() - want).square().sum((0, 2, 3)), want.square().sum((0, 2, 3))), 1)

    def _some(self, N: int, device: torch.device) -> Tensor:
        """Which of N rows are compared: random ones, the same in every layer and run, and the last."""
        if N not in self._rows:
            some = torch.randperm(N - ROWS, generator=torch.Generator().manual_seed(0))[:ROWS].sort().values
            self._rows = {N: torch.cat((some, torch.arange(N - ROWS, N))).to(device)}
        return self._rows[N]


def dense_rows(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of some queries in float32, a few key heads at a time.

    Shapes:
        q [1,H,n,D], k [1,G,M,D], v [1,G,M,Dv], q_pos [1,n], k_pos [1,1|G,M] -> [1,H,n,Dv]
    """
    H, n, D = q.shape[1:]
    G, M = k.shape[1:3]
    mine, out = (q[0].float() * scale).reshape(G, -1, D), []
    where = k_pos[0].expand(G, M)[:, None, None]
    step = max(1, WEIGHTS // (H // G * n * M))
    for part in (slice(g, g + step) for g in range(0, G, step)):
        # [key heads, query heads of each, n, M]
        scores = (mine[part] @ k[0, part].float().transpose(1, 2)).unflatten(1, (-1, n))
        hidden = (where[part] < 0) | (where[part] > q_pos[0, :, None])
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out.append(weights.flatten(1, 2) @ v[0, part].float())
    return torch.cat(out).view(1, H, n, -1)


def _add_norms(heads: Sequence[list[float]], norms: Sequence[float]) -> None:
    for at, sums in enumerate(heads):
        sums[0], sums[1] = sums[0] + norms[2 * at], sums[1] + norms[2 * at + 1]


def _add_bytes(read: list[float], size: Sequence[float]) -> None:
    read[0] += size[0]


def _check_seen(layer: int, count: int, last: Sequence[float]) -> None:
    if last[0] + 1 != count:
        raise InputError(
            f"Look: layer {layer} is at token {int(last[0])} and {count} were seen; watch from the first token on"
        )
