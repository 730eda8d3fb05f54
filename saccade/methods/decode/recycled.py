"""Recycled: a few steps read everything, the steps between them read what the last of those found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.pattern import Blocks, Full, Pattern, Tokens, Union
from saccade.methods.base import Selector, budget_tokens, check_budget, check_ints

WHOLE = 1024  # slots in a block of the list by which a row reads everything beside rows that do not


@dataclass(frozen=True)
class Recycled(Selector):
    """Recycled Attention, later RefreshKV (Xu et al., ACL 2025, arXiv 2411.05787, github.com/carriex/refreshkv).

    A full step attends to everything and remembers the tokens with the largest attention probabilities, smoothed along
    the sequence by a maximum over `kernel` neighbours. The steps after it read those and the tokens since; each newer
    token takes the place of the remembered one with the lowest score. Every `stride` steps a layer may take a full
    step again: always (the fixed schedule), or when its query has turned away from that of its last full step (a
    cosine below `threshold`).

    Args:
        budget: keys that a query reads in a partial step, its own included: a number (int), or a share (float) of
            the keys at the first full step.
        stride: steps between two full steps, or between two looks at the query.
        threshold: a look leads to a full step where the cosine of the queries, averaged over the call's heads, is
            below this. Above 1.0: at each look, the fixed schedule, for which the host never waits for the device.
            At -1.0: never again, which leaves the first pick (SnapKV with a window of 1) and the tokens since.
        kernel: neighbours in the maximum, an odd number.
        together: query heads that share a key head remember the same tokens, by the largest probability of any of
            them, as in the paper; False: each head its own.

    Shapes:
        q [B,H,N,D], k [B,G,M,D] -> Full, Tokens [B,H,N,budget] (together: [B,G,N,budget]), or the union of such Tokens
        with the rows that are due

    Raises:
        UnsupportedError: a store with holes or padding.

    Departs from the paper: the first step after a prompt is a full one, in place of the scores of the prompt's last
    token. The tokens that are read are gathered from the whole store, not copied into a second one. Rows of a batch
    decide apart. Looks are counted from the last full step; the queries compared are rotated ones. Several tokens in
    one step (a draft) count as so many steps, each with what it would read alone. Where the threshold is in [-1, 1]
    the host waits for the device at each look.

    Example:
        >>> k = torch.tensor([0.0, 9.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0]).view(1, 1, 8, 1)
        >>> method, memory, q = Recycled(budget=3, kernel=1), {}, torch.ones(1, 1, 1, 1)
        >>> steps = [method.select(q, k[:, :, :M], Call.of(q, k[:, :, :M], memory=memory)) for M in (6, 7, 8)]
        >>> steps[0], steps[1].index.tolist(), steps[2].index.tolist()
        (Full(), [[[[1, 4, 6]]]], [[[[1, 6, 7]]]])
    """

    phases = ("decode",)
    full_steps = True
    unbroken = True
    paper = "RefreshKV (Recycled Attention), ACL 2025, arXiv 2411.05787"

    budget: int | float = 2048
    stride: int = 10
    threshold: float = 2.0
    kernel: int = 7
    together: bool = True

    def __post_init__(self) -> None:
        check_budget("Recycled", self.budget)
        if isinstance(self.budget, int) and self.budget < 2:
            raise InputError(f"Recycled: a budget in tokens must be >= 2 (one for the query itself), got {self.budget}")
        check_ints(self, stride=1, kernel=1)
        if self.kernel % 2 == 0:
            raise InputError(f"Recycled: kernel must be odd, so that no slot is shifted, got {self.kernel}")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)) or not self.threshold >= -1:
            raise InputError(
                f"Recycled: threshold must be a cosine >= -1, or above 1 for always, got {self.threshold!r}"
            )
        object.__setattr__(self, "grouped", self.together)
        object.__setattr__(self, "separate", not self.together and (self.threshold > 1 or self.threshold == -1))

    def select(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        if call.filled is not None and call.causal:
            return self._standing(q[:, :, 0], k, call)
        if not (call.contiguous and call.causal):
            raise UnsupportedError(
                "Recycled: needs causal attention and a store without holes or padding; run such rows one by one"
            )
        B, _, _, N, M = call.shape
        held = self._held(call)
        lines: list[Tensor | None] = []
        whole = torch.zeros(B, N, dtype=torch.bool)
        for row in range(N):
            at = call.offset + row
            newest = held[max(held)] if held else None
            if newest is None and at + 1 <= max(2, budget_tokens(self.budget, at + 1)):
                due = torch.ones(B, dtype=torch.bool)
            else:
                due = self._due(q[:, :, row], at, newest)
                if bool(due.any()):
                    held[at] = self._refreshed(q[:, :, row], k[:, :, : at + 1], due, newest, call)
            whole[:, row] = due
            lines.append(None if newest is None or bool(due.all()) else _read(newest, at))
        return _joined(lines, whole, M)

    def estimate(self, call: Call) -> float:
        """The scores of the full steps in this call: attention forms them once more."""
        B, H = call.shape[:2]
        held = call.memory.get(_key(call), {}).get("picks", {})
        return float(sum(H * (at + 1) * int((p["at"] == at).sum()) for at, p in held.items() if at >= call.offset))

    def _standing(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        """The same for one query [B,H,D] over a store whose size stands still: the host knows when a look is due."""
        filled = call.filled
        assert filled is not None
        mine: dict[str, Any] = call.memory.setdefault(_key(call), {"slots": 0, "picks": {}})
        if mine["slots"] < call.shape.M:
            self._stand(mine, q, call)
        turn, now, at = mine["turn"](filled.at), mine["now"], filled.length - 1
        if turn == "whole":
            return Full()
        if turn == "between":
            return Tokens(_read(now, at)[:, :, None])
        index = self._best(q, k, now["index"].shape[2], call)
        new = {"at": at.expand(len(q)), "index": index, "q": _mean(q)}
        if self.threshold > 1:
            _keep(now, new)
            return Full()
        # what held before this step, also when the step was rehearsed
        old = _where(now["at"] < at, now, mine["old"])
        cosine = torch.nn.functional.cosine_similarity(new["q"], old["q"], dim=-1)
        due = (old["at"] < 0) | ((cosine < self.threshold) & (self.threshold != -1))
        _keep(mine["old"], old)
        _keep(now, _where(due, new, old))
        line = _read(old, at).masked_fill(due[:, None, None], -1)
        every = torch.arange(-(-call.shape.M // WHOLE), dtype=torch.int32, device=q.device)
        rows = due[:, None, None, None]
        # no row has both; blocks first, because what is left of single tokens beside them is found faster
        return Union((Blocks(torch.where(rows, every, -1), 1, WHOLE), Tokens(line[:, :, None])))

    def _stand(self, mine: dict[str, Any], q: Tensor, call: Call) -> None:
        """Get the memory ready for such steps: tensors that stay where they are, and when a look is due."""
        assert call.filled is not None
        start = call.filled.at
        before = [at for at in mine["picks"] if at < start] if mine["slots"] >= start else []
        pick = mine["picks"][max(before)] if before else None
        first = start
        if pick is not None:
            # rows may have found theirs at different looks, a whole number of strides apart
            first = int(pick["at"].max())
        else:
            while first + 1 <= max(2, budget_tokens(self.budget, first + 1)):
                first += 1
        B, H, G = call.shape[:3]
        if pick is None:
            count = max(2, budget_tokens(self.budget, first + 1)) - 1
            index = torch.zeros(B, G if self.together else H, count, dtype=torch.int32, device=q.device)
            pick = {"at": torch.full((B,), -1), "index": index, "q": torch.zeros_like(_mean(q))}
        now = {name: t.to(q.device, copy=True) for name, t in pick.items()}
        mine.update(slots=call.shape.M, now=now, old={name: t.clone() for name, t in now.items()})

        def turn(at: int) -> str:
            if at < first:
                return "whole"
            looks = self.threshold != -1 or at == first
            return "look" if looks and (at - first) % self.stride == 0 else "between"

        def close() -> None:
            kept, _ = mine.pop("now"), mine.pop("old")
            kept["at"] = kept["at"].cpu()
            if int(kept["at"].max()) >= 0:
                mine["picks"] = {int(kept["at"].max()): kept}

        mine.update(turn=turn, close=close)

    def _held(self, call: Call) -> dict[int, dict[str, Tensor]]:
        """What earlier full steps found, by the position of the query: the newest one that still holds."""
        mine: dict[str, Any] = call.memory.setdefault(_key(call), {"slots": 0, "picks": {}})
        picks: dict[int, dict[str, Tensor]] = mine["picks"]
        # tokens that no step of ours has seen (another prompt): start again with a full step
        before = [at for at in picks if at < call.offset] if mine["slots"] >= call.offset else []
        mine["picks"] = held = {max(before): picks[max(before)]} if before else {}
        mine["slots"] = call.shape.M
        return held

    def _due(self, q: Tensor, at: int, pick: dict[str, Tensor] | None) -> Tensor:
        """Which rows of the batch take a full step at this position, on the host: bool [B]."""
        if pick is None:
            return torch.ones(q.shape[0], dtype=torch.bool)
        age = at - pick["at"]
        looks = age >= self.stride if self.threshold > 1 else age % self.stride == 0
        if self.threshold > 1 or self.threshold == -1 or not bool(looks.any()):
            return looks & (self.threshold > 1)
        cosine = torch.nn.functional.cosine_similarity(_mean(q), pick["q"], dim=-1)
        return looks & (cosine < self.threshold).cpu()

    def _refreshed(
        self, q: Tensor, k: Tensor, due: Tensor, old: dict[str, Tensor] | None, call: Call
    ) -> dict[str, Tensor]:
        """The state after a full step of some rows: slots with the largest scores first, where and for which query."""
        at = k.shape[2] - 1
        count = max(2, budget_tokens(self.budget, at + 1)) - 1 if old is None else old["index"].shape[2]
        rows = slice(None) if old is None or bool(due.all()) else _on(due.nonzero().flatten(), k)
        index = self._best(q[rows], k[rows], count, call)
        if old is not None and isinstance(rows, Tensor):
            index = old["index"].index_copy(0, rows, index)
        new = {"at": torch.full_like(due, at, dtype=torch.long), "index": index, "q": _mean(q)}
        if old is not None:
            new["at"] = torch.where(due, new["at"], old["at"])
            new["q"] = torch.where(_on(due, k)[:, None], new["q"], old["q"])
        return new

    def _best(self, q: Tensor, k: Tensor, count: int, call: Call) -> Tensor:
        """The `count` slots with the largest smoothed probability, largest first, ties by slot: int32 [B,H|G,count]."""
        B, G, M, D = k.shape
        scores = (q.detach().reshape(B, G, -1, D) @ k.detach().transpose(-1, -2)) * call.softmax_scale(D)
        later = None
        if call.filled is not None:
            later = torch.arange(M, device=q.device) >= call.filled.length
            scores = scores.masked_fill(later, float("-inf"))
        probs = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))
        probs = probs.amax(2) if self.together else probs.flatten(1, 2)
        smooth = torch.nn.functional.max_pool1d(probs, self.kernel, stride=1, padding=self.kernel // 2)
        smooth = smooth if later is None else smooth.masked_fill(later, -1.0)
        return torch.sort(smooth, dim=-1, descending=True, stable=True).indices[..., :count].int()


def _key(call: Call) -> str:
    return f"recycled {call.heads}"


def _mean(q: Tensor) -> Tensor:
    """The query of a layer: the mean over its heads, [B,H,D] -> [B,D]."""
    return q.detach().mean(1, dtype=torch.promote_types(q.dtype, torch.float32))


def _on(due: Tensor, k: Tensor) -> Tensor:
    """Rows of the batch where the keys are, without waiting for them."""
    return due.to(k.device, non_blocking=True)


def _read(pick: dict[str, Tensor], at: int | Tensor) -> Tensor:
    """What a partial step at a position reads: the best of the pick and all tokens since, int32 [B,h,count + 1]."""
    index = pick["index"]
    count = index.shape[2]
    place = torch.arange(count + 1, device=index.device, dtype=torch.int32)
    keep: Any
    if isinstance(at, Tensor):
        keep = (count + 1 - at + pick["at"])[:, None, None]
    else:
        ages = (at - pick["at"]).tolist()
        keep = count + 1 - ages[0]
        if len(set(ages)) > 1:
            keep = _on(torch.tensor([count + 1 - age for age in ages]), index)[:, None, None]
    return torch.where(place < keep, torch.nn.functional.pad(index, (0, 1)), (place + (at - count)).int())


def _where(rows: Tensor, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of two picks the first for some rows of the batch [B], the second for the others."""
    return {name: torch.where(rows.view(-1, *[1] * (t.ndim - 1)), t, b[name]) for name, t in a.items()}


def _keep(held: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Write a pick where a captured step reads it."""
    for name, t in held.items():
        t.copy_(new[name])


def _joined(lines: list[Tensor | None], whole: Tensor, length: int) -> Pattern:
    """One pattern of rows [B,N] that read everything and rows that read a few tokens."""
    some = [line for line in lines if line is not None]
    if bool(whole.all()) or not some:
        return Full()
    empty = torch.full_like(some[0], -1)
    index = torch.stack([empty if line is None else line for line in lines], 2)
    if not bool(whole.any()):
        return Tokens(index)
    rows = _on(whole, index)[:, None, :, None]
    every = torch.arange(-(-length // WHOLE), dtype=torch.int32, device=index.device)
    return Union((Tokens(index.masked_fill(rows, -1)), Blocks(torch.where(rows, every, -1), 1, WHOLE)))
