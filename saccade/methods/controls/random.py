"""Random: blocks drawn by lot, at the same budget as the method it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.methods.base import Scorer


@dataclass(frozen=True)
class Random(Scorer):
    """Random key blocks: the control that any choice by content has to beat.

    No paper. Each query block draws its key blocks uniformly from those it may see. The block that holds the first
    row's own key is always among them, so that no row is left without a key. Every head has its own lot, tied to its
    number in the model, so a head draws the same whichever heads it is called with; batch rows share it.

    Args:
        budget: keys that a query block reads: tokens (int) or a share of the keys (float).
        block_q: rows in a query block.
        block_k: slots in a key block.
        seed: with the layer and the head it gives the draw; `call.rng`, where there is one, takes its place.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Blocks [1,H,ceil(N/block_q),K], K = ceil(budget/block_k)

    Departs from the paper: there is none.

    Example:
        >>> q = k = torch.zeros(1, 1, 256, 8)
        >>> Random(budget=64).select(q, k, Call.of(q, k)).index.flatten().tolist()
        [0, 1, 2, 3]
    """

    unbroken = True
    phases = ("prefill", "decode")
    chunked = "every call draws anew"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"Random: seed must be an int >= 0, got {self.seed!r}")

    def score(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        if not call.contiguous:
            raise UnsupportedError("Random: needs a store without holes or padding; run such rows one by one")
        _, H, _, N, M = call.shape
        nq, nk = -(-N // self.block_q), -(-M // self.block_k)
        heads = call.heads
        start = self._start(call)
        lots = []
        for head in heads:
            # drawn on the CPU, so that every device has the same lots
            generator = torch.Generator().manual_seed((start + 1_000_003 * head) % 2**63)
            lots.append(torch.rand(nq, nk, generator=generator))
        scores = torch.stack(lots)[None].to(q.device)
        own = (torch.arange(nq, device=q.device) * self.block_q + call.offset) // self.block_k
        return scores.scatter(3, own[None, None, :, None].expand(1, H, -1, -1), float("inf"))

    def _start(self, call: Call) -> int:
        if call.rng is None:
            return self.seed * 6_700_417 + call.layer * 65_537
        return int(torch.randint(2**40, (1,), generator=call.rng, device=call.rng.device))
