"""MoA: every head keeps a window of its own, whose span grows with the length as the head's rule says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.cache.store import DRAFT
from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Pattern, Window
from saccade.methods.base import CachePolicy, check_ints


@dataclass(frozen=True)
class MoA(CachePolicy):
    """One head of MoA (Mixture of Attention spans, Fu et al., COLM 2025, arXiv 2406.14909; github.com/thu-nics/MoA).

    A head sees and keeps the first tokens and its most recent ones; some heads need more of a longer text and some do
    not. In a plan `span` is a length rule {"base": alpha, "slope": beta}, worked out once for the length that
    `session.cache(length)` is given; `saccade.fit.moa` finds the rules from gradients.

    Args:
        span: tokens that are seen, the first ones included; rounded up to a multiple of `block`.
        sink: tokens from the start.
        least: a span is never shorter, in tokens.
        block: spans are multiples of this.

    Shapes:
        k [B,g,M,D] -> slots [1, 1, span + 16]

    Departs from the paper: nothing in what is seen; 16 tokens more are held, so that a draft may be taken back. Rules
        are per key head, as keys are what is kept.

    Example:
        >>> from saccade import Assign
        >>> rule = Assign((0,), "moa", {"span": {"base": -1024, "slope": 0.5}}, phase="cache")
        >>> rule.build(4096).size, rule.build(2048).size
        (1024, 128)
    """

    paper: ClassVar[str] = "MoA, COLM 2025, arXiv 2406.14909"

    span: int
    sink: int = 64
    least: int = 128
    block: int = 64

    def __post_init__(self) -> None:
        check_ints(self, span=1, sink=0, least=1, block=1)
        if self.sink >= self.size:
            raise InputError(f"MoA: sink={self.sink} leaves nothing of the span of {self.size} to the newest tokens")

    @property
    def size(self) -> int:
        """The span as it is used: at least `least`, in whole blocks."""
        return -(-max(self.span, self.least) // self.block) * self.block

    def pattern(self, call: Call) -> Pattern:
        return Window(self.sink, self.size - self.sink)

    def keep(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
        M, recent = call.shape.M, self.size - self.sink + DRAFT
        if self.sink + recent >= M:
            return None
        # slots ascend with positions, and whatever was dropped before lay between the two ends
        return torch.cat((torch.arange(self.sink), torch.arange(M - recent, M))).to(k.device)[None, None]

    def claim(self, seen: int) -> int:
        return min(seen, self.size + DRAFT)
