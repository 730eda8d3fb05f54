"""ActQKV: each window asks for old blocks with its most unusual tokens; decoding shares a budget out over layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Full, Pattern
from saccade.kernels.scores import pool, products
from saccade.kernels.summaries import summaries
from saccade.kernels.topk import top_blocks
from saccade.methods.apply import phase_of
from saccade.methods.base import Selector, check_ints

FLAT = 1e-10  # the least variance of a feature: below it a window's queries count as equal


@dataclass(frozen=True)
class ActQKV(Selector):
    """Activation-aware probe queries (Xiao et al. 2025, arXiv 2502.13542; no public repository).

    The prompt is cut into windows. A window's queries, weighted by how far each lies from the window's mean (squared
    z-score, averaged over features), are summed to one probe; the probe retrieves the key blocks before the window
    whose mean key answers best, and all queries of the window read them, the first tokens and the near past. In
    decoding each query is its own probe, and the blocks it retrieves are shared out over the layers: more for a layer
    whose block scores are spread out (entropy), fewer for one that knows what it wants.

    Args:
        budget: the most keys that a query reads, in whole blocks: first, near and retrieved ones together.
        average: retrieved blocks per layer on average (in the prompt: always), as a share of the most that the budget
            leaves for them.
        window: queries of the prompt that share a probe.
        block_k: slots in a key block.
        sink: tokens from the start that are always read.
        near: tokens before a window, or before a query in decoding, that are always read.
        temperature: of the softmax over z-scores; large ones make the probe the mean query.
        adapt: weight of the newest step in the running mean of a layer's entropy; 0.0 = all layers retrieve alike.
        together: the heads of a layer share their weights and their entropy (means over heads); False: each its own.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Full, or Blocks [B,H,ceil(N/window),K], K = blocks always read + retrieved
        on average; in decoding Blocks [B,H,N,K] with block_q = 1 and K = blocks of the budget

    Raises:
        UnsupportedError: a store with holes or padding.

    Departs from the paper: its equations are known to us from summaries only. The z-score, the weighted sum, windows
    that do not overlap and budgets by entropy are confirmed; the softmax that makes weights of z-scores, mean keys,
    running means (a layer cannot know what later layers will say in this step, so entropies of earlier steps are used)
    and all defaults are ours. Do not take results for the paper's. Queries and keys are compared as rotated. That
    blurs the mean of a long block, so small blocks decode better; turned back to no rotation, means lose what is near,
    which is worse. Several tokens in one step share the budgets of the
    step before. Where nearly all of a window asks for something, the few that do not are the unusual ones, and lead.

    Example:
        >>> k = torch.zeros(1, 1, 64, 2)
        >>> k[0, 0, 16:20, 0] = 1.0  # block 4
        >>> q = torch.zeros(1, 1, 8, 2)
        >>> q[0, 0, 3, 0] = 5.0  # one token of eight asks for it
        >>> method = ActQKV(budget=24, window=8, block_k=4, sink=4, near=4, average=1.0)
        >>> method.select(q.repeat(1, 1, 3, 1), k, Call.of(q.repeat(1, 1, 3, 1), k)).index[0, 0, -1].tolist()
        [0, 1, 4, 13, 14, 15]
    """

    phases = ("prefill", "decode")
    strictly_causal = False  # all queries of a window read what its later ones ask for, too
    chunked = "windows start at the chunk's first query"
    unbroken = True
    paper = "ActQKV, arXiv 2502.13542"

    budget: int = 4096
    average: float = 0.5
    window: int = 512
    block_k: int = 64
    sink: int = 64
    near: int = 512
    temperature: float = 1.0
    adapt: float = 0.1
    together: bool = True

    def __post_init__(self) -> None:
        check_ints(self, budget=1, window=1, block_k=1, sink=0, near=0)
        for name in ("average", "temperature", "adapt"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(f"ActQKV: {name} must be a number, got {value!r}")
        if not 0.0 < self.average <= 1.0 or not self.temperature > 0.0 or not 0.0 <= self.adapt <= 1.0:
            raise InputError(
                "ActQKV: average must be in (0, 1], temperature > 0 and adapt in [0, 1], got "
                f"{self.average}, {self.temperature} and {self.adapt}"
            )
        least = self._always(self.window) + 1
        if self.budget // self.block_k < least:
            raise InputError(
                f"ActQKV: sink {self.sink}, near {self.near} and a window of {self.window} fill up to {least - 1} "
                f"blocks of {self.block_k}; a budget of {self.budget} leaves nothing to retrieve, give at least "
                f"{least * self.block_k}"
            )
        object.__setattr__(self, "separate", not self.together)

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "ActQKV: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        if self._dense(call):
            return Full()
        means = summaries(k, self.block_k, call, "actqkv", lambda x: pool(x, self.block_k))
        if phase_of(call.shape.N, call.offset) == "prefill":
            return self._prompt(q, means, call)
        return self._step(q, means, call)

    def estimate(self, call: Call) -> float:
        B, H, _, N, M = call.shape
        probes = -(-N // self.window) if phase_of(N, call.offset) == "prefill" else N
        return 0.0 if self._dense(call) else float(B * H * probes * (M // self.block_k))

    def probe(self, q: Tensor) -> Tensor:
        """The probe of each window: q [B,H,N,D] -> [B,H,ceil(N/window),D]."""
        B, H, N, D = q.shape
        count = -(-N // self.window)
        wide = torch.promote_types(q.dtype, torch.float32)
        rows = torch.nn.functional.pad(q.detach().to(wide), (0, 0, 0, count * self.window - N))
        rows = rows.view(B, H, count, self.window, D)
        real = (torch.arange(count * self.window, device=q.device) < N).view(count, self.window, 1)
        size = real.sum(1, keepdim=True)
        away = (rows - rows.sum(3, keepdim=True) / size) * real
        variance = away.square().sum(3, keepdim=True) / size
        bias = (away.square() / variance.clamp_min(FLAT)).mean(-1, keepdim=True)
        bias = bias.mean(1, keepdim=True) if self.together else bias
        weight = torch.softmax((bias / self.temperature).masked_fill(~real, float("-inf")), 3)
        return (weight * rows).sum(3)

    def _prompt(self, q: Tensor, means: Tensor, call: Call) -> Pattern:
        """All queries of a window read what its probe retrieves."""
        first = torch.arange(call.offset, call.shape.M, self.window, device=q.device)
        last = (first + self.window).clamp(max=call.shape.M) - 1
        scores, old, must = self._scored(self.probe(q), means, first, last, call)
        if self.adapt:
            state = self._state(call)
            self._note(state, call, _spread(scores[:, :, -1:], old[-1:], call.softmax_scale(q.shape[3])))
        count = self._always(self.window) + self._retrieved(self.window)
        return top_blocks(scores.masked_fill(must, float("inf")), count, self.window, self.block_k, call)

    def _step(self, q: Tensor, means: Tensor, call: Call) -> Pattern:
        """Each query reads what it retrieves itself, as many blocks as its layer's turn allows."""
        at = torch.arange(call.offset, call.shape.M, device=q.device)
        scores, old, must = self._scored(q, means, at, at, call)
        always = self._always(1)
        most, usual = self.budget // self.block_k - always, self._retrieved(1)
        turn: Tensor | int = usual
        if self.adapt:
            state = self._state(call)
            turn = _turn(state["before"], call.layer, usual, most, q.device)
            self._note(state, call, _spread(scores, old, call.softmax_scale(q.shape[3])))
        best = scores.masked_fill(~old, float("-inf")).topk(min(most, scores.shape[3]), -1)
        kept = best.values.masked_fill(torch.arange(best.values.shape[3], device=q.device) >= turn, float("-inf"))
        chosen = torch.full_like(scores, float("-inf")).scatter(3, best.indices, kept)
        return top_blocks(chosen.masked_fill(must, float("inf")), always + most, 1, self.block_k, call)

    def _scored(
        self, probe: Tensor, means: Tensor, first: Tensor, last: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [B,H,n,blocks] of probes for rows first..last, which blocks are old, and which are always read."""
        block = torch.arange(-(-call.shape.M // self.block_k), device=probe.device)
        scores = products(probe, means.to(probe.dtype))
        # the newest block may not be whole; it is always read
        scores = torch.nn.functional.pad(scores, (0, len(block) - scores.shape[3]))
        near = (first - self.near).clamp_min(0)[:, None] // self.block_k
        sink = -(-self.sink // self.block_k)
        old = (block >= sink) & (block < near)
        # what lies beyond the last row's block is cut off by causality
        must = (block < sink) | ((block >= near) & (block <= last[:, None] // self.block_k))
        return scores, old, must

    def _state(self, call: Call) -> dict[str, Any]:
        """The entropies of all layers: kept in the memory of the first one, and handed on through the step.

        "means" maps a number of tokens to the running means after them, [B,H,layers], NaN where a layer said nothing;
        "before" is what held before this call. They lie where one of the layers lies; others may lie on another device.
        """
        key = f"actqkv of all layers {call.heads}"
        if key in call.step:
            handed: dict[str, Any] = call.step[key]
            return handed
        held: dict[str, Any] = call.memory.setdefault(key, {"slots": 0, "means": {}})
        known = [after for after in held["means"] if after <= min(held["slots"], call.offset)]
        before = {max(known): held["means"][max(known)]} if known else {}
        held.update(slots=call.shape.M, means=dict(before), before=next(iter(before.values()), None))
        call.step[key] = held
        return held

    def _note(self, state: dict[str, Any], call: Call, spread: Tensor) -> None:
        """Put the entropies [B,H,n] of this layer's newest n queries into the running means after each of them."""
        if self.together:
            spread = spread.mean(1, keepdim=True).expand_as(spread)
        B, H, n = spread.shape
        before = state["before"]
        mean = None if before is None or before.shape[2] <= call.layer else before[:, :, call.layer].to(spread.device)
        for i in range(n):
            new = spread[:, :, i]
            mean = new if mean is None else torch.where(mean.isnan(), new, mean + self.adapt * (new - mean))
            after = call.shape.M - n + 1 + i
            board = state["means"].get(after)
            if board is None or board.shape[2] <= call.layer:
                wider = torch.full((B, H, 2 * call.layer + 8), float("nan"), dtype=mean.dtype, device=mean.device)
                if board is not None:
                    wider[:, :, : board.shape[2]] = board
                state["means"][after] = board = wider
            board[:, :, call.layer] = mean

    def _always(self, rows: int) -> int:
        """The most blocks that sinks, near past and so many rows of their own touch."""
        touched = -(-(self.near + rows - 1) // self.block_k) + 1
        return -(-self.sink // self.block_k) + touched

    def _retrieved(self, rows: int) -> int:
        """Blocks retrieved on average."""
        return max(1, round(self.average * (self.budget // self.block_k - self._always(rows))))

    def _dense(self, call: Call) -> bool:
        return self.budget // self.block_k * self.block_k >= call.shape.M


def _spread(scores: Tensor, old: Tensor, scale: float) -> Tensor:
    """Entropy of the softmax over the old blocks as a share of its most: [B,H,n,blocks] -> [B,H,n] in [0, 1]."""
    log = (scores * scale).masked_fill(~old, float("-inf")).log_softmax(-1)
    entropy = -(log.exp() * log.masked_fill(~old, 0.0)).sum(-1)
    count = old.sum(-1)
    # nothing to choose between: as spread out as can be
    return torch.where(count > 1, entropy / count.clamp_min(2).log(), 1.0)


def _turn(board: Tensor | None, layer: int, usual: int, most: int, device: torch.device) -> Tensor | int:
    """Blocks that this layer may retrieve now: its share of all layers' entropies, [B,H,1,1]."""
    if board is None or board.shape[2] <= layer:
        return usual
    mine = board[:, :, layer]
    share = mine / board.nanmean(-1).clamp_min(1e-6)
    share = torch.where(share.isnan(), 1.0, share)
    return (usual * share).round().clamp(1, most)[:, :, None, None].to(device)
