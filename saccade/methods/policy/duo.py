"""DuoAttention: retrieval heads keep everything, streaming heads keep sink and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.cache.store import DRAFT
from saccade.core.call import Call
from saccade.core.pattern import Pattern, Window
from saccade.methods.base import CachePolicy, check_ints


@dataclass(frozen=True)
class DuoAttention(CachePolicy):
    """What a streaming head of DuoAttention keeps (Xiao et al., ICLR 2025, arXiv 2410.10819).

    Official code: mit-han-lab/duo-attention. A few key heads find things far away, the others look at the first
    tokens and the near past. Give this policy to the streaming heads in a plan (phase "cache"); the heads that no
    policy names are retrieval heads. Which is which comes from `saccade.fit.duo` or from the published files
    (`saccade.fit.published.from_duo`). Keys keep the positions they were rotated with.

    Args:
        sink: tokens kept from the start of the sequence.
        recent: tokens kept from its end, the newest included.

    Shapes:
        k [B,g,M,D] -> slots [B|1, g|1, min(M, sink + recent + 16)]

    Departs from the paper: the official evaluation runs the first prefill densely for all heads and cuts afterwards.
        Here streaming heads see sink and recent in every phase, as in the paper's training, so that one shot, chunks,
        decoding and draft verification give the same numbers. Assign "dense" to them in prefill for the official way.
        16 tokens more are held than are seen, so that a draft may be taken back.

    Example:
        >>> from saccade import Assign, ModelShape, Plan
        >>> streaming = Assign((1,), "duo", {"sink": 16, "recent": 64}, phase="cache")
        >>> Plan.per_head(ModelShape(1, 4, 2), [[streaming]]).phase(0, "cache")[0].build().claim(1000)
        96
    """

    sink: int = 64
    recent: int = 256
    paper: ClassVar[str] = "DuoAttention, ICLR 2025, arXiv 2410.10819"

    def __post_init__(self) -> None:
        check_ints(self, sink=0, recent=1)

    def pattern(self, call: Call) -> Pattern:
        return Window(self.sink, self.recent)

    def keep(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor | None:
        M, recent = call.shape.M, self.recent + DRAFT
        if self.sink + recent >= M:
            return None
        # slots ascend with positions, and whatever was dropped before lay between the two ends
        ends = torch.cat((torch.arange(self.sink), torch.arange(M - recent, M)))
        return ends.to(k.device)[None, None]

    def claim(self, seen: int) -> int:
        return min(seen, self.sink + self.recent + DRAFT)
