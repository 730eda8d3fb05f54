"""HiPExtend: InfiniteHiP's stages at positions within the trained length, for contexts that are far longer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Blocks
from saccade.core.rope import Rope
from saccade.kernels.attend import attend
from saccade.kernels.merge import Out
from saccade.kernels.moved import attend_moved
from saccade.kernels.prune import Place
from saccade.methods.base import Attention, check_ints
from saccade.methods.select.infinitehip import InfiniteHiP, Scan, is_step


@dataclass(frozen=True)
class HiPExtend(Attention):
    """Context extension of InfiniteHiP (Lee et al. 2025, arXiv 2502.08910): no training, no distance that is new.

    Official code: DeepAuto-AI/hip-attention. Queries at positions that the model was trained on are served as
    `infinitehip` does. Beyond, keys are found in the same stages, but compared at other positions. In most layers the
    query stands just behind the window, and the keys of the two halves of a chunk stand at 0 and 1 (relative). In the
    first layers keys stand at their chunk's number and the query as far behind the last chunk as the window is long
    (chunk-indexed). First tokens, what was found, and the window are then renumbered to follow one another and read.

    Args:
        trained: positions that the model was trained on.
        keys: tokens that a query reads, first and near ones included, at most `trained`.
        sink: positions from the start that are always read, in whole blocks.
        window: positions up to the query that are always read, itself included, in whole blocks.
        chunks: tokens of a chunk in each stage; each a multiple of the next. The last is the key block that is read.
        keep: tokens that each stage but the last keeps.
        strides: in each stage, how many neighbouring rows of a query block judge as their mean.
        refresh: while decoding, each stage is made at positions that are multiples of its period.
        block_q: rows that search together in prefill; while decoding each token has its own search.
        indexed: layers before this one compare at chunk numbers, the others relatively.

    Shapes:
        q [B,H,N,D], k [B,G,M,D], v [B,G,M,Dv] -> Out(o [B,H,N,Dv], lse [B,H,N])

    Departs from the paper: keys come rotated and only the difference is rotated again, where the paper's code stores
        them unrotated; no layer is dense beyond the trained length.

    Raises:
        UnsupportedError: a model whose rotary positions are not known, or a store with holes.
        InputError: more keys than `trained`, or so few that first and near ones use them up; stages as in
            `infinitehip`.

    Example:
        >>> q, k = torch.randn(1, 4, 300, 8), torch.randn(1, 2, 300, 8)
        >>> stages = dict(chunks=(32, 8), keep=(64,), strides=(4, 1), refresh=(4, 2))
        >>> method = HiPExtend(trained=128, keys=120, sink=8, window=24, block_q=16, **stages)
        >>> method.attend(q, k, k, Call.of(q, k, rope=Rope(torch.rand(4)))).o.shape
        torch.Size([1, 4, 300, 8])
    """

    phases = ("prefill", "decode")
    strictly_causal = False  # the rows of a query block choose together
    exact = False
    chunked = "query blocks start where a chunk of the prompt starts"
    unbroken = True
    paper = "InfiniteHiP, 2025, arXiv 2502.08910"

    trained: int = 8192
    keys: int = 4096
    sink: int = 256
    window: int = 1024
    chunks: tuple[int, ...] = (256, 32, 8)
    keep: tuple[int, ...] = (32768, 8192)
    strides: tuple[int, ...] = (4, 4, 1)
    refresh: tuple[int, ...] = (32, 16, 8)
    block_q: int = 64
    indexed: int = 3

    def __post_init__(self) -> None:
        check_ints(self, trained=1, keys=1, sink=0, window=1, block_q=1, indexed=0)
        inner = self._inner
        for name in ("chunks", "keep", "strides", "refresh"):
            object.__setattr__(self, name, getattr(inner, name))
        if self.keys > self.trained:
            raise InputError(
                f"HiPExtend: keys={self.keys} reach beyond the {self.trained} positions that the model was trained on; "
                "read fewer"
            )
        for step in (False, True):
            if self._kept(step) < 1:
                rows = 1 if step else self.block_q
                raise InputError(
                    f"HiPExtend: keys={self.keys} leave no chunk of {self.chunks[-1]} to search for beside "
                    f"sink={self.sink}, window={self.window}, {rows} rows and refresh={self.refresh[0]}"
                )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Out:
        call.check(q, k, v, name="HiPExtend")
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "HiPExtend: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        if call.rope is None:
            raise UnsupportedError(
                "HiPExtend: moves keys to other positions, but how this model rotates them is not known"
            )
        N = call.shape.N
        near = min(N, max(0, self.trained - call.offset))
        outs = []
        if near:
            part = replace(call, shape=call.shape._replace(N=near, M=call.offset + near))
            mine = q[:, :, :near], k[:, :, : part.shape.M], v[:, :, : part.shape.M]
            outs.append(attend(*mine, self._inner.select(mine[0], mine[1], part), part))
        if near < N:
            part = replace(call, shape=call.shape._replace(N=N - near))
            outs.append(attend_moved(q[:, :, near:], k, v, self._far(q[:, :, near:], k, part), part))
        if len(outs) == 1:
            return outs[0]
        sums = [out.lse for out in outs if out.lse is not None]
        return Out(torch.cat([out.o for out in outs], 2), torch.cat(sums, 2))

    def estimate(self, call: Call) -> float:
        N, M = call.shape.N, call.shape.M
        near = min(N, max(0, self.trained - call.offset))
        total = 0.0
        if near:
            part = replace(call, shape=call.shape._replace(N=near, M=call.offset + near))
            seen = torch.arange(part.offset, part.shape.M).add(1).clamp(max=self.keys)
            total += float(call.shape.B * call.shape.H * seen.sum()) + self._inner.estimate(part)
        if near < N:
            part = replace(call, shape=call.shape._replace(N=N - near))
            total += call.shape.B * call.shape.H * (N - near) * min(self.keys, M)
            total += self._inner.looks(part, self._kept(is_step(part)))
        return total

    @property
    def _inner(self) -> InfiniteHiP:
        """The method for positions that the model knows."""
        mine = {name: value for name, value in asdict(self).items() if name not in ("trained", "keys", "indexed")}
        return InfiniteHiP(budget=self.keys, first=0, **mine)

    def _kept(self, step: bool) -> int:
        """Chunks that the last stage may keep, so that the list with first and near blocks stays within the budget."""
        size = self.chunks[-1]
        return self.keys // size - -(-self.sink // size) - self._near(step)

    def _near(self, step: bool) -> int:
        """Blocks that the windows of a query block's rows lie in at most."""
        rows = self.refresh[0] if step else self.block_q
        return -(-(self.window + rows - 1) // self.chunks[-1]) + 1

    def _far(self, q: Tensor, k: Tensor, call: Call) -> Blocks:
        """Blocks for queries beyond the trained length, first and near ones among them."""
        step, size, M = is_step(call), self.chunks[-1], call.shape.M
        inner, kept = self._inner, self._kept(step)
        assert call.rope is not None
        scan = _indexed(call.rope, self.window) if call.layer < self.indexed else _relative(call.rope, self.window)
        found = (inner.steps if step else inner.blocks)(q, k, call, kept, scan)
        rows = 1 if step else self.block_q
        count = found.shape[2]
        first = torch.arange(count, device=q.device) * rows + call.offset
        last = (first + rows - 1).clamp(max=M - 1) // size
        # a search may be as old as the first stage's period, and ended where its own near past began
        begin = (first - self.window - (self.refresh[0] if step else 1) + 1).clamp_min(0) // size
        near = begin[:, None] + torch.arange(self._near(step), device=q.device)
        sink = torch.arange(-(-self.sink // size), device=q.device).expand(count, -1)
        always = torch.cat((sink, near), 1)
        always = always.masked_fill(always > last[:, None], -1)
        return Blocks(_union(found, always), rows, size)


def _union(found: Tensor, always: Tensor) -> Tensor:
    """Each block once, ascending, -1 at the end: found [B,H,n,K] and always [n,L] -> int32 [B,H,n,K+L]."""
    every = torch.cat((found, always.expand(*found.shape[:2], -1, -1).to(found.dtype)), 3)
    none = torch.iinfo(every.dtype).max
    every = every.masked_fill(every < 0, none).sort(3).values
    again = torch.nn.functional.pad(every[..., 1:] == every[..., :-1], (1, 0))
    every = every.masked_fill(again, none).sort(3).values
    return every.masked_fill(every == none, -1)


def _relative(rope: Rope, window: int) -> Scan:
    """The query just behind the window, keys at 0 and 1."""

    def scan(q: Tensor, at: Tensor, count: Tensor, room: int) -> tuple[Tensor, Place]:
        rows = rope(q.flatten(2, 3), (window + 1 - at).flatten()).view(q.shape)
        return rows, lambda keys, slots, right: rope(keys, (int(right) - slots).flatten(2))

    return scan


def _indexed(rope: Rope, window: int) -> Scan:
    """Keys at their chunk's number, the query a window behind the last chunk, and no further than it is."""

    def scan(q: Tensor, at: Tensor, count: Tensor, room: int) -> tuple[Tensor, Place]:
        to = torch.minimum(at, count[..., None] + window)
        rows = rope(q.flatten(2, 3), (to - at).flatten(2)).view(q.shape)
        number = torch.arange(room, device=q.device)
        return rows, lambda keys, slots, right: rope(keys, (number - slots).flatten(2))

    return scan
