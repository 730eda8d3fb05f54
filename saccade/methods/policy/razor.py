"""RazorAttention: heads that retrieve keep everything, the others keep two ends and one token for all between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.cache.group import Fold
from saccade.cache.store import DRAFT
from saccade.core.call import Call
from saccade.methods.base import CachePolicy, check_ints


@dataclass(frozen=True)
class RazorAttention(CachePolicy):
    """What a non-retrieval head of RazorAttention keeps (Tang et al., ICLR 2025, arXiv 2407.15891).

    No code came with the paper. Give this policy to the heads that do not retrieve (`saccade.fit.razor` finds them by
    echo and induction scores). They keep the first tokens, a buffer of the newest, and one compensation token: the mean
    key and mean value of all that was dropped, whose logit is raised by the log of their number, so that it weighs as
    much as all of them would if they were alike.

    Args:
        sink: tokens kept from the start.
        least: the buffer is never shorter, in tokens.
        ratio: the buffer is a `ratio`-th of the tokens seen, where that is more than `least`.
        slack: tokens beyond the buffer that may gather before it is cut again.
        compensate: keep the compensation token; without it the dropped tokens are simply gone (the paper's ablation).

    Shapes:
        k [B,g,M,D] -> slots [1, 1, sink + 1 + buffer + 16], the one after the sinks is the compensation token

    Departs from the paper: it says nothing of decoding beyond the buffer; here what leaves the buffer joins the mean.
        16 tokens more than the buffer are held, so that a draft may be taken back.

    Example:
        >>> RazorAttention(sink=4, least=100, ratio=5, slack=32).claim(1000)
        253
    """

    chunked: ClassVar[str] = "each chunk is folded before the next one is read"
    exact: ClassVar[bool] = False
    paper: ClassVar[str] = "RazorAttention, ICLR 2025, arXiv 2407.15891"

    sink: int = 4
    least: int = 4000
    ratio: int = 5
    slack: int = 64
    compensate: bool = True

    def __post_init__(self) -> None:
        check_ints(self, sink=0, least=1, ratio=1, slack=0)

    def keep(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
        M, newest = call.shape.M, self._buffer(_seen(call))
        middle = int(self.compensate)
        if self.sink + middle + newest + self.slack >= M:
            return None
        # the last of the dropped slots lends its place to the token that stands for them all
        ends = torch.cat((torch.arange(self.sink), torch.arange(M - newest - middle, M)))
        return ends.to(k.device)[None, None]

    def fold(self, k: Tensor, v: Tensor, bias: Tensor | None, slots: Tensor, call: Call) -> Fold | None:
        if not self.compensate:
            return None
        gone = slice(self.sink, k.shape[2] - (slots.shape[2] - self.sink - 1))
        wide = torch.promote_types(k.dtype, torch.float32)
        # the token that stood for those dropped earlier is among them and weighs as many
        count = torch.ones_like(k[:, :, gone, 0], dtype=wide) if bias is None else bias[:, :, gone].exp().to(wide)
        total = count.sum(-1, keepdim=True)
        mean = [((t[:, :, gone].to(wide) * count[..., None]).sum(2) / total).to(t.dtype) for t in (k, v)]
        return Fold(self.sink, *mean, total.squeeze(-1).log().float())

    def claim(self, seen: int) -> int:
        return min(seen, self.sink + int(self.compensate) + self._buffer(seen) + self.slack)

    def _buffer(self, seen: int) -> int:
        return max(self.least, seen // self.ratio) + DRAFT


def _seen(call: Call) -> int:
    """Tokens of the sequence so far; the slots are fewer once something was dropped."""
    return call.shape.M if call.q_pos is None else int(call.q_pos.max()) + 1
