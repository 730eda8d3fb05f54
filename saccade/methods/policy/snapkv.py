"""SnapKV: the last queries of a prompt know what will be asked for; what they look at stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from saccade.cache.store import DRAFT
from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.kernels.mass import key_mass
from saccade.methods.base import CachePolicy, check_ints


@dataclass(frozen=True)
class SnapKV(CachePolicy):
    """What the observation window votes for (SnapKV, Li et al. 2024, arXiv 2404.14469).

    Official code: FasterDecoding/SnapKV. The weights of the last `window` queries are summed for each key, pooled over
    neighbours so that a phrase stays together, and the tokens with most of it are kept beside the window itself. Query
    heads that share a key head choose together by their mean. What the prompt's end does not ask about is lost.

    Args:
        capacity: tokens kept per key head, the window included.
        window: last queries that vote; as many newest tokens are always kept.
        kernel: neighbours pooled by their maximum, an odd number; 1 = none.
        slack: tokens beyond the capacity that may gather before it is cut again.

    Shapes:
        q [B,H,N,D], k [B,g,M,D] -> slots [B, g, capacity]

    Departs from the paper: there the prompt is cut once and every decoded token stays; here the cache is cut again when
        `slack` tokens have come, by the votes of the last queries, so that bytes stay bounded. A key head's query heads
        choose together. 16 tokens more than the window are never dropped, so that a draft may be taken back.

    Example:
        >>> SnapKV(capacity=1024, window=32, slack=64).claim(50_000)
        1088
    """

    chunked: ClassVar[str] = "each chunk is cut by its own last queries"
    grouped: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "SnapKV, NeurIPS 2024, arXiv 2404.14469"

    capacity: int = 1024
    window: int = 32
    kernel: int = 7
    slack: int = 64

    def __post_init__(self) -> None:
        check_ints(self, capacity=1, window=1, kernel=1, slack=0)
        if self.kernel % 2 == 0:
            raise InputError(f"SnapKV: kernel must be odd, so that pooling shifts nothing, got {self.kernel}")
        if self.capacity <= self.window + DRAFT:
            raise InputError(
                f"SnapKV: capacity {self.capacity} must be above window + {DRAFT} = {self.window + DRAFT}, "
                "or nothing is left to vote for"
            )

    def keep(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
        M, newest = call.shape.M, self.window + DRAFT
        past = call.memory.get(("snapkv", call.heads))
        asked = q.detach()
        if past is not None:
            # a call of few tokens: those before them still vote, but for those that were taken back
            gone = max(0, past["held"] - (M - call.shape.N))
            asked = torch.cat((past["q"][:, :, : max(0, past["q"].shape[2] - gone)], asked), 2)
        whole = not self._cuts(M)
        # a copy: a slice would hold all queries of the prompt in memory. More than vote, as a draft may be taken back
        kept = asked[:, :, -self.window - DRAFT :].clone()
        call.memory["snapkv", call.heads] = {"q": kept, "held": M if whole else self.capacity}
        if whole:
            return None
        voters = asked[:, :, -self.window :]
        votes = key_mass(voters, k, _at_the_end(voters, call)).unflatten(1, (call.shape.G, -1)).mean(2)
        votes = max_pool1d(votes[..., : M - newest], self.kernel, stride=1, padding=self.kernel // 2)
        best = votes.topk(self.capacity - newest).indices.sort(-1).values
        last = torch.arange(M - newest, M, device=k.device).expand(*best.shape[:2], -1)
        return torch.cat((best, last), 2)

    def scored(self, call: Call) -> float:
        B, H, _, _, M = call.shape
        return float(B * H * (self.window * M - self.window * (self.window - 1) // 2)) if self._cuts(M) else 0.0

    def claim(self, seen: int) -> int:
        return min(seen, self.capacity + self.slack)

    def _cuts(self, held: int) -> bool:
        return held > self.capacity + self.slack


def _at_the_end(q: Tensor, call: Call) -> Call:
    """The call of queries that are the last ones: some of them may have been answered before this call."""
    n = q.shape[2]
    shape = call.shape._replace(N=n)
    if call.q_pos is None:
        return replace(call, shape=shape)
    end = call.q_pos[:, -1:] + 1
    return replace(call, shape=shape, q_pos=end - torch.arange(n, 0, -1, device=q.device))
