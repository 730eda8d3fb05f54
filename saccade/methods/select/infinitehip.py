"""InfiniteHiP: the keys that matter are found in stages, each of which cuts what is left into smaller chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Blocks, Full, Pattern, Union, Window
from saccade.kernels.prune import Place, levels, prune
from saccade.methods.base import Selector, budget_tokens, check_budget, check_ints

PACKED = 16  # queries of a decoding call at most, and tokens that may be taken back

# queries [B,H,n,R,D], their positions [n,R], how many chunks each query block has in a stage [1|B,1|H,n], room for
# chunks -> queries and keys as that stage is to compare them
Scan = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Place]]


@dataclass(frozen=True)
class InfiniteHiP(Selector):
    """Staged pruning of the context (InfiniteHiP, Lee et al. 2025, arXiv 2502.08910), positions as they are.

    Official code: DeepAuto-AI/hip-attention. For each block of queries the past is cut into chunks. A chunk is judged
    by a descent: of two halves the one whose middle key answers the queries best goes on, and the best answer on the
    way is the chunk's score. The best chunks are cut into smaller ones and judged anew, stage after stage; what the
    last stage keeps is read, beside first tokens and the near past. While decoding, each stage is made anew at its own
    period, with all stages after it. `hipextend` reads beyond the trained length in the same way.

    Args:
        budget: keys that a query reads, first and near ones included: tokens, or a share of the keys below 1.0.
        sink: positions from the start that are always read.
        window: positions up to the query that are always read, itself included.
        chunks: tokens of a chunk in each stage; each a multiple of the next. The last is the key block that is read.
        keep: tokens that each stage but the last keeps; more where the budget is to read more.
        strides: in each stage, how many neighbouring rows of a query block judge as their mean.
        refresh: while decoding, each stage is made at positions that are multiples of its period; none longer than the
            period before it.
        block_q: rows that search together in prefill; while decoding each token has its own search.
        first: layers before this one stay dense.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Union of Window and Blocks [B,H,ceil(N/block_q),K], or Full

    Departs from the paper: while decoding the window reaches as far as the first stage is old, so that no token is ever
        in neither; layers that read more, or that are dense at the end of a model, are a matter of the plan.

    Raises:
        InputError: a budget that first and near tokens use up; chunks that do not divide one another; lists of
            different lengths; periods that grow.

    Example:
        >>> q = k = torch.randn(1, 1, 2048, 8)
        >>> stages = dict(chunks=(64, 8), keep=(1024,), strides=(4, 1), refresh=(16, 8))
        >>> method = InfiniteHiP(512, sink=16, window=128, **stages)
        >>> pattern = method.select(q, k, Call.of(q, k, layer=5))
        >>> [type(part).__name__ for part in pattern.parts], list(pattern.parts[1].index.shape)
        (['Window', 'Blocks'], [1, 1, 32, 44])
    """

    phases = ("prefill", "decode")
    strictly_causal = False  # the rows of a query block choose together
    chunked = "query blocks start where a chunk of the prompt starts"
    unbroken = True
    paper = "InfiniteHiP, 2025, arXiv 2502.08910"

    budget: int | float = 3360
    sink: int = 256
    window: int = 1024
    chunks: tuple[int, ...] = (256, 32, 8)
    keep: tuple[int, ...] = (32768, 8192)
    strides: tuple[int, ...] = (4, 4, 1)
    refresh: tuple[int, ...] = (32, 16, 8)
    block_q: int = 64
    first: int = 4

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_budget(name, self.budget)
        check_ints(self, sink=0, window=1, block_q=1, first=0)
        check_stages(self)
        room = self.sink + self.window + self.refresh[0] - 1
        least = room + self.chunks[-1]
        if isinstance(self.budget, int) and self.budget < least:
            raise InputError(
                f"{name}: a budget of {self.budget} leaves no chunk of {self.chunks[-1]} to search for beside sink="
                f"{self.sink}, window={self.window} and refresh={self.refresh[0]}; give at least {least}"
            )

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "InfiniteHiP: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        if self._dense(call):
            return Full()
        decoding = is_step(call)
        kept = self._kept(call.shape.M)
        index = self.steps(q, k, call, kept) if decoding else self.blocks(q, k, call, kept)
        # the first stage may be `refresh` tokens old, and ends where its own near past began
        near = self.window + (self.refresh[0] - 1 if decoding else 0)
        return Union((Window(self.sink, near), Blocks(index, 1 if decoding else self.block_q, self.chunks[-1])))

    def estimate(self, call: Call) -> float:
        return 0.0 if self._dense(call) else self.looks(call, self._kept(call.shape.M))

    def _dense(self, call: Call) -> bool:
        """Early layers, and where the budget holds everything."""
        return call.layer < self.first or budget_tokens(self.budget, call.shape.M) >= call.shape.M

    def _kept(self, length: int) -> int:
        """Chunks that the last stage keeps."""
        left = budget_tokens(self.budget, length) - self.sink - self.window - self.refresh[0] + 1
        return max(1, left // self.chunks[-1])

    def blocks(self, q: Tensor, k: Tensor, call: Call, kept: int, scan: Scan | None = None) -> Tensor:
        """Prefill: one search for each block of queries, int32 [B,H,query blocks,kept]."""
        N, M = call.shape.N, call.shape.M
        count = -(-N // self.block_q)
        # the last row stands in for rows that are not there
        rows = torch.arange(count * self.block_q, device=q.device).clamp(max=N - 1).view(count, self.block_q)
        at = rows + call.offset
        return self._index(self.search(q[:, :, rows], at, k, at[:, -1] + 1, M, kept, scan=scan)[-1])

    def steps(self, q: Tensor, k: Tensor, call: Call, kept: int, scan: Scan | None = None) -> Tensor:
        """Decoding: each token reads what the last stage found last, int32 [B,H,N,kept]."""
        stages = range(len(self.chunks))
        name = f"infinitehip {'' if scan is None else 'moved '}{call.heads}"
        mine: dict[str, Any] = call.memory.setdefault(name, {"slots": 0, "found": {}})
        # tokens that were taken back searched for others; tokens that were never seen here start anew
        old = mine["found"] if mine["slots"] >= call.offset else {}
        found = {i: {at: t for at, t in old.get(i, {}).items() if at < call.offset} for i in stages}
        lines = []
        for row in range(call.shape.N):
            at = call.offset + row
            due = next((i for i in stages if self._due(i, at, found[i])), None)
            if due is not None:
                before = found[due - 1][max(found[due - 1])] if due else None
                where = torch.full((1, 1), at, device=q.device)
                made = self.search(q[:, :, row, None, None], where, k, where[:, 0] + 1, at + 1, kept, due, before, scan)
                for i, low in zip(stages[due:], made, strict=True):
                    found[i][at] = low
            lines.append(self._index(found[stages[-1]][max(found[stages[-1]])]))
        # what would be in use if up to 16 tokens were taken back
        least = call.shape.M - PACKED
        mine["found"] = {
            i: {at: t for at, t in held.items() if at >= max([a for a in held if a < least], default=0)}
            for i, held in found.items()
        }
        mine["slots"] = call.shape.M
        width = max(line.shape[3] for line in lines)
        return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[3]), value=-1) for t in lines], 2)

    def search(
        self,
        q: Tensor,
        at: Tensor,
        k: Tensor,
        last: Tensor,
        length: int,
        kept: int,
        first: int = 0,
        low: Tensor | None = None,
        scan: Scan | None = None,
    ) -> list[Tensor]:
        """What each stage from `first` on keeps: first slots of its chunks, int64 [B,H,n,...].

        Args:
            q: all rows of each query block, [B,H,n,R,D], at positions `at` [n,R].
            k: keys [B,G,M,D].
            last: tokens that the last row of each query block sees, [n]; `length` is the largest of them.
            kept: chunks that the last stage keeps.
            low: what the stage before `first` kept.
            scan: how queries and keys are to be compared; None = as they stand.
        """
        start = self.sink // self.chunks[-1] * self.chunks[-1]
        stop = (last - self.window).clamp_min(0)
        found = []
        for i in range(first, len(self.chunks)):
            size = self.chunks[i]
            if low is None:
                most = max(1, -(-(length - self.window - start) // size))
                low = (start + size * torch.arange(most, device=k.device)).expand(1, 1, 1, -1)
            else:
                parts = low[..., None] + torch.arange(0, self.chunks[i - 1], size, device=k.device)
                low = parts.masked_fill(low[..., None] < 0, -1).flatten(3)
            rows, place = q, None
            if scan is not None:
                count = ((low >= 0) & (low < stop[:, None])).sum(3)
                rows, place = scan(q, at, count, low.shape[3])
            if rows.shape[3] > 1:
                rows = rows.unflatten(3, (-1, self.strides[i])).mean(4)
            low = prune(rows.detach(), k.detach(), low, size, stop, self._keeps(i, kept), place)
            found.append(low)
        return found

    def looks(self, call: Call, kept: int) -> float:
        """Keys that the stages look at, once for each judge, summed over rows of the batch and heads."""
        B, H, _, N, M = call.shape
        start = self.sink // self.chunks[-1] * self.chunks[-1]
        step = is_step(call)
        last = torch.arange(call.offset, M) + 1
        if not step:
            last = last[self.block_q - 1 :: self.block_q]
            last = torch.cat((last, torch.tensor([M] * (-(-N // self.block_q) - len(last)))))
        left, total = (last - self.window - start).clamp_min(0), 0.0
        for i, size in enumerate(self.chunks):
            count = -(-left // size)
            keeps = self._keeps(i, kept)
            judges = 1 / self.refresh[i] if step else self.block_q // self.strides[i]
            total += float(count[count > keeps].sum()) * 2 * levels(size) * judges
            left = torch.minimum(left, torch.tensor(keeps * size))
        return B * H * total

    def _keeps(self, stage: int, kept: int) -> int:
        """Chunks that a stage keeps, where the last one keeps `kept`."""
        if stage == len(self.keep):
            return kept
        return -(-max(self.keep[stage], kept * self.chunks[-1]) // self.chunks[stage])

    def _due(self, stage: int, at: int, held: dict[int, Tensor]) -> bool:
        period = self.refresh[stage]
        return not held or at % period == 0 or at - max(held) >= period

    def _index(self, low: Tensor) -> Tensor:
        return torch.where(low < 0, -1, low // self.chunks[-1]).int()


def is_step(call: Call) -> bool:
    """Is this a decoding call?"""
    return call.offset > 0 and call.shape.N <= PACKED


def check_stages(method: Any) -> None:
    """Lists of hyperparameters, an entry for each stage; they become tuples."""
    name = type(method).__name__
    for field in ("chunks", "keep", "strides", "refresh"):
        value = getattr(method, field)
        fine = isinstance(value, (list, tuple)) and all(type(x) is int and x >= 1 for x in value)
        if not fine:
            raise InputError(f"{name}: {field} must be a list of ints >= 1, one for each stage, got {value!r}")
        object.__setattr__(method, field, tuple(value))
    chunks, keep, stages = method.chunks, method.keep, len(method.chunks)
    lengths = {"keep": stages - 1, "strides": stages, "refresh": stages}
    wrong = [
        f"{field} has {len(getattr(method, field))} entries"
        for field, n in lengths.items()
        if len(getattr(method, field)) != n
    ]
    if not stages or wrong:
        raise InputError(
            f"{name}: {stages} stages (chunks={list(chunks)}) need {stages} strides and refresh periods, and a keep "
            f"for each but the last; {', '.join(wrong) or 'there must be one stage at least'}"
        )
    if any(a % b for a, b in pairwise(chunks)):
        raise InputError(f"{name}: each of chunks={list(chunks)} must be a multiple of the next")
    if any(method.block_q % stride for stride in method.strides):
        raise InputError(f"{name}: strides={list(method.strides)} must divide block_q={method.block_q}")
    if any(a < b for a, b in pairwise(method.refresh)):
        raise InputError(
            f"{name}: refresh={list(method.refresh)}: a stage is made anew with the one before it, so that no period "
            "may be longer than the one before it"
        )
    if any(n < size for n, size in zip(keep, chunks, strict=False)):
        raise InputError(f"{name}: keep={list(keep)} must hold a chunk of {list(chunks[:-1])} tokens in each stage")
