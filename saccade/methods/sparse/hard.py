"""Hard attention: each query reads its few best keys and gives the others exactly nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Pattern, Tokens
from saccade.kernels.topk import top_tokens
from saccade.methods.base import Selector, budget_now, budget_tokens, check_budget

TILE = 1 << 22  # scores held at a time


@dataclass(frozen=True)
class HardAttention(Selector):
    """Top-k attention with a 1-bit preselection (AxFormer, Nagarajan et al. 2022, arXiv 2010.03688; no official code).

    For every query the `budget` keys with the largest scores are kept, and the softmax runs over those. With
    `candidates` the exact scores are formed only for keys whose signs agree with the query's in the most channels,
    which hardware counts a bit at a time (of equal counts the earlier key comes first). Meant for layers where a few
    keys decide and the others distract; a plan says which, `saccade.fit.axformer.hard_layers` searches for it by the
    loss, and `saccade.fit.axformer.prune` is the paper's other half, the parts that a model is no worse without.

    Args:
        budget: keys that a query reads: tokens, or a share of the keys below 1.0.
        candidates: keys that the count of equal signs lets through; None = all, as many as the budget at least.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Tokens [B,H,N,budget]

    Departs from the paper: decoders instead of classifiers, so a query has min(budget, keys seen so far) keys; signs
        are multiplied as numbers here, which gives the same counts and saves nothing.

    Example:
        >>> k = torch.tensor([3.0, 1.0, 2.0, 0.0]).view(1, 1, 4, 1)
        >>> q = torch.ones(1, 1, 1, 1)
        >>> HardAttention(budget=2).select(q, k, Call.of(q, k)).index.flatten().tolist()
        [0, 2]
    """

    phases = ("prefill", "decode")
    unbroken = True
    paper = "AxFormer, IJCNN 2022, arXiv 2010.03688"

    budget: int | float = 64
    candidates: int | None = None

    def __post_init__(self) -> None:
        check_budget("HardAttention", self.budget)
        if self.candidates is None:
            return
        if isinstance(self.candidates, bool) or not isinstance(self.candidates, int) or self.candidates < 1:
            raise InputError(f"HardAttention: candidates must be an int >= 1 or None, got {self.candidates!r}")

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if call.filled is not None and call.causal and self.candidates is None:
            return self._standing(q.detach(), k.detach(), call)
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "HardAttention: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        B, H, _, N, M = call.shape
        count = budget_tokens(self.budget, M)
        q, k = q.detach(), k.detach()
        step = max(1, TILE // (B * H * M))
        lines = []
        for a in range(0, N, step):
            b = min(a + step, N)
            seen = call.offset + b
            part = replace(call, shape=call.shape._replace(N=b - a, M=seen))
            index = self._best(q[:, :, a:b], k[:, :, :seen], count, part)
            lines.append(pad(index, (0, count - index.shape[3]), value=-1))
        return Tokens(torch.cat(lines, 2))

    def _standing(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        """One query over a store whose size stands still: slots still to come are not among the best."""
        assert call.filled is not None
        index = top_tokens(q, k, budget_tokens(self.budget, call.shape.M), call).index
        if isinstance(self.budget, float):
            # a share of what is stored now, not of all the room; the best come first
            now = budget_now(self.budget, call.filled.length)
            index = index.masked_fill(torch.arange(index.shape[3], device=q.device) >= now, -1)
        return Tokens(_ascending(index))

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        return float(B * H * (N * call.offset + N * (N + 1) // 2 + N * min(M, self.candidates or 0)))

    def _best(self, q: Tensor, k: Tensor, count: int, call: Call) -> Tensor:
        """The best keys of each query, ascending, -1 last: int32 [B,H,n,up to count]."""
        if self.candidates is None or max(count, self.candidates) >= call.shape.M:
            return _ascending(top_tokens(q, k, count, call).index)
        B, H, G, N, M = call.shape
        agree = (q.sign().reshape(B, G, -1, q.shape[3]) @ k.sign().transpose(-1, -2)).view(B, H, N, M)
        slots = torch.arange(M, device=q.device)
        agree = agree.masked_fill(slots > slots[M - N :, None], float("-inf"))
        # counts are often equal: only a stable order is the same in every chunk
        order = agree.sort(dim=-1, descending=True, stable=True)
        sure = order.indices.masked_fill(order.values.isneginf(), -1)[..., : max(count, self.candidates)]
        batch = torch.arange(B, device=q.device)[:, None, None, None]
        head = (torch.arange(H, device=q.device) // (H // G))[:, None, None]
        scores = torch.einsum("bhnd,bhncd->bhnc", q, k[batch, head, sure.clamp_min(0)])
        best = scores.masked_fill(sure < 0, float("-inf")).topk(min(count, sure.shape[3]), dim=-1).indices
        return _ascending(sure.gather(3, best).int())


def _ascending(index: Tensor) -> Tensor:
    """Slots in order, empties last."""
    last = torch.iinfo(torch.int32).max
    index = torch.where(index < 0, last, index).sort(-1).values
    return index.masked_fill(index == last, -1)
