"""Quest: pages of keys by the most that their products with the query can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Blocks, Full, Pattern
from saccade.kernels.scores import pool_bounds, products
from saccade.kernels.select import on_gpu
from saccade.kernels.summaries import standing, summaries
from saccade.kernels.topk import largest, top_blocks
from saccade.methods.base import Selector, budget_now, budget_tokens, check_budget, check_ints


@dataclass(frozen=True)
class Quest(Selector):
    """Query-aware sparse decoding (Tang et al., ICML 2024, arXiv 2406.10774, github.com/mit-han-lab/Quest).

    Of each page of keys the smallest and the largest value of every feature are kept. Feature by feature they bound
    the product with a query, and their sum is never below the largest score in the page. Each query reads the pages
    with the largest bounds and always the page it stands in itself, as in the official kernels. Layers before `first`
    are dense.

    Args:
        budget: keys that a query reads, in whole pages, its own page included: a number (int) or a share of the
            stored keys (float).
        block_k: slots in a page.
        first: the first layer that is sparse.
        together: query heads that share a key head read the same pages, those with the largest share of any of
            them (softmax over the bounds); a kernel then reads each page once for the group.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Full, or Blocks [B,H,N,K] (together: [B,G,N,K]) with block_q = 1,
        K = ceil(budget/block_k)

    Raises:
        UnsupportedError: a store with holes or padding.

    Departs from the paper: a page is summarised when it is whole (before that it is a query's own and read in any
    case), so that several tokens in one step give what they give one by one. `together` is for grouped-query models,
    which the paper does not treat; False is the paper's choice. The bounds are kept in float32: 1/block_k of the bytes
    of float32 keys and values. The first step after a prompt reads all keys once to make them; the estimate counts the
    two products per page of every step.

    Example:
        >>> k = torch.zeros(1, 1, 9, 2)
        >>> k[0, 0, 2] = torch.tensor([3.0, -3.0])  # page 1 of 2 slots each
        >>> q = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2)
        >>> Quest(budget=4, block_k=2, first=0).select(q, k, Call.of(q, k)).index.tolist()
        [[[[1, 4]]]]
    """

    phases = ("decode",)
    unbroken = True
    paper = "Quest, ICML 2024, arXiv 2406.10774"

    budget: int | float = 1024
    block_k: int = 16
    first: int = 2
    together: bool = False

    def __post_init__(self) -> None:
        check_budget("Quest", self.budget)
        check_ints(self, block_k=1, first=0)
        object.__setattr__(self, "grouped", self.together)
        object.__setattr__(self, "separate", not self.together)

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if call.filled is not None and call.causal:
            return Full() if self._dense(call) else self._standing(q, k, call)
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "Quest: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        if self._dense(call):
            return Full()
        M = call.shape.M
        bounds = summaries(k, self.block_k, call, "quest", self._bounds)
        scores = products(torch.cat((q.clamp_max(0), q.clamp_min(0)), -1), bounds)
        own = torch.arange(call.offset, M, device=q.device)[:, None] // self.block_k
        page = torch.arange(-(-M // self.block_k), device=q.device)
        # the newest page may not be whole: it has no bounds yet, and needs none
        scores = torch.nn.functional.pad(scores, (0, len(page) - scores.shape[3]))
        if self.together:
            scores = self._joined(scores.masked_fill(page >= own, float("-inf")), q, call)
        scores = scores.masked_fill(page == own, float("inf"))
        return top_blocks(scores, self._pages(M), 1, self.block_k, call)

    def _standing(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        """The same pages for one query over a store whose size stands still; pages still to come are not there."""
        filled, M = call.filled, call.shape.M
        assert filled is not None
        pages, most, spare = -(-M // self.block_k), self._pages(M), self._pages(M) - self._pages(filled.least)
        # the same in all layers: which pages are old, which is the query's own, and blank columns behind them. A share
        # is meant of what is stored now: blanks take up what the share of all the room has too much
        key = f"quest {self.block_k} {self.budget} {M}"
        if key not in call.step:
            page, own = torch.arange(pages, device=q.device), (filled.length - 1) // self.block_k
            blank = torch.zeros_like(filled.length)
            if isinstance(self.budget, float):
                blank = most + budget_now(self.budget, filled.length).neg().div(self.block_k, rounding_mode="floor")
            call.step[key] = page >= own, page == own, blank
        later, mine, blank = call.step[key]
        scores = self._scores(q, k, spare, later, mine, blank, call)
        if spare == 0:
            return top_blocks(scores, most, 1, self.block_k, call)
        index = largest(scores.flatten(0, 2)[None], most).view(*scores.shape[:3], -1)
        return Blocks(index.masked_fill(index >= pages, -1), 1, self.block_k)

    def _scores(
        self, q: Tensor, k: Tensor, spare: int, later: Tensor, mine: Tensor, blank: Tensor, call: Call
    ) -> Tensor:
        """Scores [B,H|G,1,pages + spare]: -inf for pages to come, +inf for the query's own and for blank columns."""
        if on_gpu(q, k, width=q.shape[3]) and not self.together:
            from saccade.kernels import triton_pages

            assert call.filled is not None
            rows = standing(k, self.block_k, call, "quest", self._bounds)
            sizes = (self.block_k, call.filled.length, len(later), spare, blank, float("inf"))
            return triton_pages.page_scores(q, k, rows, *sizes)
        bounds = summaries(k, self.block_k, call, "quest", self._bounds)
        scores = products(torch.cat((q.clamp_max(0), q.clamp_min(0)), -1), bounds)
        scores = scores.masked_fill(later, float("-inf"))
        if self.together:
            scores = self._joined(scores, q, call)
        scores = scores.masked_fill(mine, float("inf"))
        if spare == 0:
            return scores
        more = torch.where(torch.arange(spare, device=q.device) < blank, float("inf"), float("-inf"))
        return torch.cat((scores, more.to(scores.dtype).expand(*scores.shape[:3], -1)), 3)

    def _joined(self, scores: Tensor, q: Tensor, call: Call) -> Tensor:
        """The largest share of any query head of a key head: scores [B,H,N,pages] -> [B,G,N,pages]."""
        shares = (scores * call.softmax_scale(q.shape[3])).log_softmax(-1)
        return shares.unflatten(1, (call.shape.G, -1)).amax(2)

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        return 0.0 if self._dense(call) else 2.0 * B * H * N * (M // self.block_k)

    def _pages(self, length: int) -> int:
        return -(-budget_tokens(self.budget, length) // self.block_k)

    def _dense(self, call: Call) -> bool:
        M = call.shape.M
        if call.layer < self.first:
            return True
        # a share of all the room says nothing of what is stored now
        varies = call.filled is not None and isinstance(self.budget, float) and self.budget < 1.0
        return not varies and self._pages(M) * self.block_k >= M

    def _bounds(self, k: Tensor) -> Tensor:
        """Smallest and largest of each feature side by side: [B,G,n*block_k,D] -> [B,G,n,2D]."""
        return torch.cat(pool_bounds(k, self.block_k), -1).to(torch.promote_types(k.dtype, torch.float32))
