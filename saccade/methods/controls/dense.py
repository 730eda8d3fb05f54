"""Dense: every key that causality allows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core.call import Call
from saccade.core.pattern import Full, Pattern
from saccade.methods.base import Selector


@dataclass(frozen=True)
class Dense(Selector):
    """Softmax attention to everything (Vaswani et al. 2017, arXiv 1706.03762).

    The control that every sparse method is compared with, and what heads that may not skip anything run.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Full

    Departs from the paper: nothing.

    Example:
        >>> import torch
        >>> q = k = torch.zeros(1, 1, 4, 8)
        >>> call = Call.of(q, k)
        >>> Dense().select(q, k, call).density(call)
        1.0
    """

    phases = ("prefill", "decode")
    paper = "Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762"

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        return Full()
