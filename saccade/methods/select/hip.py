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
from saccade.kernels.tree_step import tree_step
from saccade.methods.base import Selector, budget_now, budget_tokens, check_budget, check_ints


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
        stride: every how many rows of a query block are looked at by the search, its last one among them.
        refresh: a search is made at positions that are multiples of this, and used until the next.
        first: layers before this one stay dense.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Union of Window and Blocks [B,H,ceil(N/block_q),K], or Full

    Departs from the paper: blocks of 64 queries and 16 keys instead of 32 and 2, which suit matrix products; no
        channels are left out of the scores. InfiniteHiP's stages are `infinitehip`, its context extension `hipextend`.

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
    unbroken = True
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
        if call.filled is not None and call.causal:
            return self._standing(q, k, call)
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
        # the last row is one of those that judge: it may be the one that asks
        rows = padded.unflatten(2, (count, self.block_q))[:, :, :, (self.block_q - 1) % self.stride :: self.stride]
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
                length = torch.full((1,), at + 1, device=q.device)
                found[at] = self._search_one(
                    q[:, :, row : row + 1], k[:, :, : at + 1], length, self._kept(call.shape.M)
                )
            lines.append(found[max(found)])
        # what would be in use if up to 16 tokens were taken back
        oldest = max([at for at in found if at < call.shape.M - 16], default=0)
        mine["found"] = {at: t for at, t in found.items() if at >= oldest}
        mine["slots"] = call.shape.M
        width = max(line.shape[3] for line in lines)
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[3]), value=-1) for t in lines], 2)

    def _standing(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        """One query over a store whose size stands still: the host knows when a search is due, the device how long."""
        filled = call.filled
        assert filled is not None
        if call.layer < self.first:
            return Full()
        mine: dict[str, Any] = call.memory.setdefault(f"hip {call.heads}", {"slots": 0, "found": {}})
        if mine["slots"] < call.shape.M:
            self._stand(mine, q, call)
        turn, index = mine["turn"](filled.at), mine["index"]
        if turn == "whole":
            return Full()
        if turn == "search":
            now = None
            if isinstance(self.budget, float):
                # a share of what is stored now, not of all the room
                left = budget_now(self.budget, filled.length) - self.sink - self.window - self.refresh + 1
                now = (left // self.block_k).clamp_min(1)
            index.copy_(self._search_one(q, k, filled.length, index.shape[3], now))
        return Union((Window(self.sink, self.window + self.refresh - 1), Blocks(index, 1, self.block_k)))

    def _stand(self, mine: dict[str, Any], q: Tensor, call: Call) -> None:
        """Get the memory ready for such steps: a choice that stays where it is, and when it is made anew."""
        assert call.filled is not None
        start, M = call.filled.at, call.shape.M
        found = {at: t for at, t in mine["found"].items() if at < start} if mine["slots"] >= start else {}
        index = torch.full((*call.shape[:2], 1, self._kept(M)), -1, dtype=torch.int32, device=q.device)
        if found:
            # what is beyond the width is empty
            newest = found[max(found)][..., : index.shape[3]]
            index[..., : newest.shape[3]] = newest
        first = start
        while budget_tokens(self.budget, first + 1) >= first + 1:
            first += 1
        late = not found or first - max(found) >= self.refresh

        def turn(at: int) -> str:
            if at < first:
                return "whole"
            return "search" if at % self.refresh == 0 or (late and at == first) else "between"

        def close() -> None:
            made = [at for at in range(start, mine["slots"]) if turn(at) == "search"]
            mine["found"] = {max(made): mine["index"]} if made else found
            del mine["index"]

        mine.update(slots=M, found=found, index=index, turn=turn, close=close)

    def _search_one(self, q: Tensor, k: Tensor, length: Tensor, kept: int, now: Tensor | None = None) -> Tensor:
        """The best key blocks of one query [B,H,1,D] before its near past; `length` [1] tokens are stored with it."""
        start = self.sink // self.block_k
        stop = -(-(length - self.window).clamp_min(0) // self.block_k)
        return tree_step(q.detach(), k.detach(), start, stop, kept, self.block_k, length, now)

    def _search(self, rows: Tensor, k: Tensor, last: Tensor, length: int) -> Tensor:
        """The best key blocks of each query block: rows [B,H,n,R,D], last [n] = tokens that its last row sees."""
        kept = self._kept(length)
        start = self.sink // self.block_k
        stop = -(-(last - self.window).clamp_min(0) // self.block_k)
        return tree_search(rows.detach(), k.detach(), start, stop, kept, self.block_k)
