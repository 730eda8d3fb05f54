"""HiP: the keys that matter are found by a tree search that never looks at all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Blocks, Full, Pattern, Union, Window
from saccade.kernels.tree import rounds, tree_search
from saccade.methods.base import Selector, budget_tokens, check_budget, check_ints


@dataclass(frozen=True)
class HiP(Selector):
    """Hierarchically pruned attention (HiP, Lee et al., ICLR 2025, arXiv 2406.09827).

    Official code: DeepAuto-AI/hip-attention. For each block of queries the past is split into as many ranges as key
    blocks may be kept. Every range is halved, a half is judged by its first key block (the largest q·k of any row with
    any key in it), the best of all halves go on, until ranges are single blocks: about log2(length / budget) looks at
    as many keys as will be read. It relies on neighbouring keys being alike. First tokens and the near past are always
    read. While decoding, a search is used for `refresh` tokens.

    Args:
        budget: keys that a query reads, first and near ones included: tokens, or a share of the keys below 1.0.
        sink: positions from the start that are always read.
        window: positions up to the query that are always read, itself included.
        block_q: rows that share a search in prefill; while decoding each token has its own.
        block_k: slots in a key block.
        stride: every how many rows of a query block are looked at by the search.
        refresh: a search is made at positions that are multiples of this, and used until the next.
        first: layers before this one stay dense.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Union of Window and Blocks [B,H,ceil(N/block_q),K], or Full

    Departs from the paper: blocks of 64 queries and 16 keys instead of 32 and 2, which suit matrix products; no
        channels are left out of the scores. InfiniteHiP's stages and context extension are not part of this method.

    Raises:
        InputError: a budget that first and near tokens use up.

    Example:
        >>> q = k = torch.randn(1, 1, 2048, 8)
        >>> call = Call.of(q, k, layer=5)
        >>> pattern = HiP(budget=512, sink=16, window=128).select(q, k, call)
        >>> [type(part).__name__ for part in pattern.parts], list(pattern.parts[1].index.shape)
        (['Window', 'Blocks'], [1, 1, 32, 22])
    """

    phases = ("prefill", "decode")
    strictly_causal = False  # the rows of a query block choose together
    chunked = "query blocks start where a chunk starts"
    paper = "HiP Attention, ICLR 2025, arXiv 2406.09827"

    budget: int | float = 1024
    sink: int = 16
    window: int = 128
    block_q: int = 64
    block_k: int = 16
    stride: int = 2
    refresh: int = 8
    first: int = 3

    def __post_init__(self) -> None:
        check_budget("HiP", self.budget)
        check_ints(self, sink=0, window=1, block_q=1, block_k=1, stride=1, refresh=1, first=0)
        if isinstance(self.budget, int) and self.budget < self.sink + self.window + self.refresh + self.block_k:
            raise InputError(
                f"HiP: a budget of {self.budget} leaves no block of {self.block_k} to search for beside sink="
                f"{self.sink}, window={self.window} and refresh={self.refresh}"
            )

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "HiP: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        if self._dense(call):
            return Full()
        decoding = call.offset > 0 and call.shape.N <= 16
        index = self._steps(q, k, call) if decoding else self._blocks(q, k, call)
        # a search made up to `refresh` tokens ago ends where its own near past began
        near = self.window + (self.refresh - 1 if decoding else 0)
        return Union((Window(self.sink, near), Blocks(index, 1 if decoding else self.block_q, self.block_k)))

    def estimate(self, call: Call) -> float:
        if self._dense(call):
            return 0.0
        B, H, _, N, M = call.shape
        kept = self._kept(M)
        looks = (1 + rounds(-(-M // self.block_k), kept)) * kept * self.block_k
        if call.offset > 0 and N <= 16:
            return B * H * looks * N / self.refresh
        return float(B * H * looks * -(-N // self.stride))

    def _dense(self, call: Call) -> bool:
        """Early layers, and where the budget holds everything or is too small a share to search with."""
        return call.layer < self.first or budget_tokens(self.budget, call.shape.M) >= call.shape.M

    def _kept(self, length: int) -> int:
        """Key blocks that a search may keep."""
        left = budget_tokens(self.budget, length) - self.sink - self.window - self.refresh + 1
        return max(1, left // self.block_k)

    def _blocks(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """Prefill: one search for each block of queries, int32 [B,H,query blocks,K]."""
        B, H, _, N, M = call.shape
        count = -(-N // self.block_q)
        padded = torch.nn.functional.pad(q, (0, 0, 0, count * self.block_q - N))
        # rows that are not there are zeros and would win with 0 where all products are negative: the last one stands in
        if padded.shape[2] > N:
            padded[:, :, N:] = q[:, :, -1:]
        rows = padded.unflatten(2, (count, self.block_q))[:, :, :, :: self.stride]
        last = torch.arange(1, count + 1, device=q.device).mul(self.block_q).clamp(max=N) + call.offset
        return self._search(rows, k, last, M)

    def _steps(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """Decoding: each token reads what the search at the last multiple of `refresh` found, int32 [B,H,N,K]."""
        N = call.shape.N
        mine: dict[str, Any] = call.memory.setdefault(f"hip {call.heads}", {"slots": 0, "found": {}})
        # tokens that were taken back searched for others; tokens that were never seen here start anew
        found = {at: t for at, t in mine["found"].items() if at < call.offset} if mine["slots"] >= call.offset else {}
        lines = []
        for row in range(N):
            at = call.offset + row
            if not found or at % self.refresh == 0 or at - max(found) >= self.refresh:
                last = torch.full((1,), at + 1, device=q.device)
                found[at] = self._search(q[:, :, row, None, None], k[:, :, : at + 1], last, call.shape.M)
            lines.append(found[max(found)])
        # one older search stays, for the case that the newest one's token is taken back
        mine["found"] = {at: found[at] for at in sorted(found)[-2:]}
        mine["slots"] = call.shape.M
        width = max(line.shape[3] for line in lines)
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[3]), value=-1) for t in lines], 2)

    def _search(self, rows: Tensor, k: Tensor, last: Tensor, length: int) -> Tensor:
        """The best key blocks of each query block: rows [B,H,n,R,D], last [n] = tokens that its last row sees."""
        kept = self._kept(length)
        start = self.sink // self.block_k
        stop = -(-(last - self.window).clamp_min(0) // self.block_k)
        return tree_search(rows.detach(), k.detach(), start, stop, kept, self.block_k)
