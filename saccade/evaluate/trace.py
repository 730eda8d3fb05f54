"""Trace: one run, watched: density, kept mass, and pictures of where each layer and head looked.

Watching takes time, so nothing is timed here. Pictures are small arrays of shares: 1 = all of a cell's pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Pattern, per_head
from saccade.core.plan import Plan
from saccade.evaluate.generate import answer, serving
from saccade.evaluate.headmap import HeadMeter
from saccade.evaluate.model import Loaded
from saccade.methods.apply import Seen

SIZE = 64  # cells along a side of a picture
SHOWN = 4  # heads of a layer that are drawn


@dataclass
class Trace:
    """Watches a session (`session.watch = trace`) while one prompt is answered.

    Args:
        heads: query heads of the model; up to four of them, evenly spread, are drawn unless `drawn` names others.
        total: tokens of the prompt.
        drawn: heads to draw.
        mass: draw where dense attention's weight lies, not which pairs are read (for a dense plan).
        span: first and last + 1 token of a planted fact, to find the head that looks at it.

    Attributes:
        meter: density and mass so far.
        prefill: per layer, [heads drawn, SIZE, SIZE]: queries down, keys across.
        steps: per layer, one [heads of the model, SIZE] per generated token: keys across.
        finders: per layer, [heads]: how much of the last query's weight lies on the span (dense runs only).
    """

    heads: int
    total: int
    drawn: tuple[int, ...] = ()
    mass: bool = False
    span: tuple[int, int] | None = None
    meter: HeadMeter = field(default_factory=HeadMeter)
    prefill: dict[int, Tensor] = field(default_factory=dict)
    steps: dict[int, list[Tensor]] = field(default_factory=dict)
    finders: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.drawn:
            count = min(SHOWN, self.heads)
            self.drawn = tuple(i * self.heads // count for i in range(count))

    def __call__(self, seen: Seen) -> None:
        """Take note of one attend."""
        self.meter(seen)
        if seen.pattern is None:
            return
        call = seen.call
        ids = call.heads
        if call.shape.N > 16 or call.shape.N == call.shape.M:
            self._prefill(seen, ids)
        else:
            self._step(seen, ids)

    def density(self, phase: str) -> float | None:
        """Measured density of "prefill" or "decode", selection included."""
        return self.meter.density(phase)

    def picked_layer(self, phase: str) -> int:
        """The layer that reads least in this phase; among equals, the one nearest the middle."""
        layers = sorted({at for _, at in self.meter.layers})
        middle = (len(layers) - 1) / 2

        def rank(layer: int) -> tuple[float, float]:
            share = self.meter.density(phase, layer)
            return (1.0 if share is None else round(share, 2), abs(layer - middle))

        return min(layers, key=rank)

    def finder(self) -> tuple[int, int]:
        """Layer and head whose last query looks hardest at the span."""
        layer = max(self.finders, key=lambda at: float(self.finders[at].max()))
        return layer, int(self.finders[layer].argmax())

    def last_step(self) -> Tensor:
        """Where every layer and head looked for the last token: [layers * heads, SIZE].

        Nowhere, for heads whose method gave the answer itself and showed no pattern.
        """
        blank = [torch.zeros(self.heads, SIZE)]
        layers = sorted({at for _, at in self.meter.layers} | set(self.steps))
        return torch.cat([self.steps.get(layer, blank)[-1] for layer in layers])

    def _prefill(self, seen: Seen, ids: tuple[int, ...]) -> None:
        assert seen.pattern is not None
        call, wanted = seen.call, [i for i, h in enumerate(ids) if h in self.drawn]
        if self.mass:
            # one head at a time: weights are rows x keys large
            picture = torch.stack([pool_mass(probabilities(seen, i)) for i in wanted]) if wanted else torch.zeros(0)
            if self.span is not None:
                looks = [probabilities(seen, i, last=True)[0, slice(*self.span)].sum() for i in range(len(ids))]
                self.finders[call.layer] = torch.stack(looks).cpu()
        elif wanted:
            share = call.shape.H // call.shape.G
            sub = call.take(tuple(wanted), tuple(i // share for i in wanted))
            picture = seen.pattern.heads(wanted).draw(sub, SIZE)
            picture = picture.expand(len(wanted), -1, -1)
        if wanted:
            whole = self.prefill.setdefault(call.layer, torch.zeros(len(self.drawn), *picture.shape[1:]))
            whole[[self.drawn.index(ids[i]) for i in wanted]] = picture.float().cpu()

    def _step(self, seen: Seen, ids: tuple[int, ...]) -> None:
        assert seen.pattern is not None
        call = seen.call
        now = int(call.q_pos.max()) if call.q_pos is not None else call.shape.M - 1
        rows = self.steps.setdefault(call.layer, [])
        # a new token starts a new row; groups of heads of one layer fill the same row
        while len(rows) <= now - self.total:
            rows.append(torch.zeros(self.heads, SIZE))
        rows[-1][list(ids)] = read_cells(seen.pattern, call, now + 1).cpu()


def read_cells(pattern: Pattern, call: Call, tokens: int) -> Tensor:
    """Which share of each cell of positions the call's last query reads: [H, SIZE]."""
    H, N, M = call.shape.H, call.shape.N, call.shape.M
    mask = pattern.mask(call, torch.tensor([N - 1], device=pattern.device))[0, :, 0].float()
    _, k_pos = call.positions(pattern.device)
    at = per_head(k_pos, call)[0].expand(H, M).clamp_min(0)
    cell = (at * SIZE // tokens).clamp(max=SIZE - 1)
    read = torch.zeros(H, SIZE, device=mask.device).scatter_add_(1, cell, mask)
    size = torch.bincount(torch.arange(tokens, device=mask.device) * SIZE // tokens, minlength=SIZE)
    return (read / size.clamp_min(1)).clamp(max=1)


def probabilities(seen: Seen, head: int, last: bool = False) -> Tensor:
    """Dense attention weights of one head's sampled queries (4 to a cell), or of its last one: [rows, M]."""
    call, q, k = seen.call, seen.q, seen.k
    N, share = call.shape.N, call.shape.H // call.shape.G
    rows = torch.linspace(N - 1 if last else 0, N - 1, 1 if last else min(N, 4 * SIZE), device=q.device).round().long()
    scores = q[0, head, rows].float() * call.softmax_scale(q.shape[3]) @ k[0, head // share].float().T
    later = torch.arange(k.shape[2], device=q.device) > (rows + call.offset)[:, None]
    return scores.masked_fill(later, float("-inf")).softmax(-1)


def pool_mass(weights: Tensor) -> Tensor:
    """Weights [rows, M] as a picture [SIZE, SIZE], the heaviest cell of each row at 1 (square root for the eye)."""
    size = min(SIZE, *weights.shape)
    picture = torch.nn.functional.adaptive_avg_pool2d(weights[None, None], (size, size))[0, 0]
    return (picture / picture.amax(-1, keepdim=True).clamp_min(1e-12)).sqrt()


def trace(
    loaded: Loaded,
    plan: Plan | None,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 8,
    drawn: tuple[int, ...] = (),
    span: tuple[int, int] | None = None,
) -> Trace:
    """Answer one prompt under a plan, watched. None = dense: the picture is then where its weight lies."""
    shape = loaded.shape
    found = Trace(shape.heads, len(ids), drawn, mass=plan is None, span=span)
    with serving(loaded, plan or Plan.uniform(shape), found) as cache:
        answer(loaded, ids, cache(len(ids)), max_new_tokens=max_new_tokens, least=max_new_tokens)
    return found
