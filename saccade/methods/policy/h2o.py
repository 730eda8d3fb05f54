"""H2O: heavy hitters, the tokens that all queries so far gave most weight, and the newest tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.cache.store import DRAFT
from saccade.core.call import Call
from saccade.kernels.mass import key_mass
from saccade.methods.base import CachePolicy, check_ints


@dataclass(frozen=True)
class H2O(CachePolicy):
    """The heavy-hitter oracle (Zhang et al., NeurIPS 2023, arXiv 2306.14048; github.com/FMInference/H2O).

    Every key head sums, over all queries answered so far, the attention weight that each stored token was given. When
    more is stored than the budget, the tokens with the least of it go; the newest are always kept, for they had no time
    to collect any. Query heads that share a key head choose together by their mean.

    Args:
        heavy: tokens kept for the weight they collected.
        recent: newest tokens kept whatever they collected.

    Shapes:
        q [B,H,N,D], k [B,g,M,D] -> slots [B, g, heavy + recent + 16]

    Departs from the paper: prefill is dense and evicts once, at its end; query heads of one key head choose together,
        which the paper has no need of; 16 tokens more than `recent` are held, so that a draft may be taken back. The
        summing forms all scores of a prefill once more, in tiles: it costs about what dense attention costs.

    Example:
        >>> H2O(heavy=100, recent=28).claim(5000)
        144
    """

    chunked: ClassVar[str] = "each chunk evicts before the next one is read"
    grouped: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "H2O, NeurIPS 2023, arXiv 2306.14048"

    heavy: int = 512
    recent: int = 512

    def __post_init__(self) -> None:
        check_ints(self, heavy=1, recent=1)

    def keep(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
        M, newest = call.shape.M, self.recent + DRAFT
        mass = key_mass(q, k, call).unflatten(1, (call.shape.G, -1)).mean(2)
        # what was summed lies before this call's tokens; where tokens were taken back, others stand in their slots now
        past = call.memory.get(("h2o", call.heads))
        if past is not None:
            old = min(past.shape[2], M - call.shape.N)
            mass[..., :old] += past[..., :old]
        slots = None
        if self.heavy + newest < M:
            best = mass[..., : M - newest].topk(self.heavy).indices.sort(-1).values
            last = torch.arange(M - newest, M, device=k.device).expand(*best.shape[:2], -1)
            slots = torch.cat((best, last), 2)
            mass = mass.gather(2, slots)
        call.memory["h2o", call.heads] = mass
        return slots

    def scored(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        return float(B * H * (N * M - N * (N - 1) // 2))

    def claim(self, seen: int) -> int:
        return min(seen, self.heavy + self.recent + DRAFT)
