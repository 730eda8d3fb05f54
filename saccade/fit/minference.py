"""MInference's offline search: which pattern suits which head, at equal cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.pattern import Full, Pattern
from saccade.core.table import build
from saccade.methods.base import Selector

Candidate = tuple[str, dict[str, int]]

# the paper's sizes for 30k tokens; only their proportions count once a budget is given
CANDIDATES: tuple[Candidate, ...] = (
    ("streaming", {"sink": 100, "recent": 800}),
    ("minference", {"columns": 30, "diagonals": 800}),
    ("minference", {"columns": 100, "diagonals": 800}),
    ("minference", {"columns": 500, "diagonals": 700}),
    ("minference", {"columns": 1000, "diagonals": 4096}),
    ("minference", {"columns": 3500, "diagonals": 100}),
    ("pooled", {"budget": 6400}),
)


def search(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    budget: float | None = 0.1,
    candidates: Sequence[Candidate] = CANDIDATES,
    rows: int = 64,
    seed: int = 0,
) -> list[tuple[str, dict[str, int], float]]:
    """The best candidate for each query head of one layer: (method, args, error).

    Kernel-aware search of MInference (Jiang et al. 2024, arXiv 2407.02490, github.com/microsoft/MInference). Every
    candidate is brought to the same cost: its sizes keep their proportions and grow until the pairs that a head visits,
    in whole blocks as a kernel visits them, plus what selection costs, would pass the budget. The candidate whose
    output differs least from dense attention wins; the error is ||o - o_dense|| / ||o_dense|| over sampled rows.

    Args:
        q: queries of one long sample, rotated as attention sees them.
        k: its keys.
        v: its values.
        budget: the cost allowed, as a share of dense attention; None takes the candidates' sizes as they are.
        candidates: (method, sizes in tokens).
        rows: rows on which errors are measured.
        seed: draws the rows.

    Shapes:
        q [1,H,N,D], k [1,G,N,D], v [1,G,N,Dv] -> a list of H

    Departs from the paper: winners are kept as they are (its code turns other patterns into vertical-slash), cost is
    counted and not assumed, rows come from behind the first eighth of the sample, where patterns are all but dense.

    Raises:
        InputError: a batch, a budget outside (0, 1], no candidate, or none that is cheap enough.

    Example:
        >>> q, k = torch.zeros(1, 2, 512, 8), torch.zeros(1, 2, 512, 8)
        >>> v = torch.ones(1, 2, 512, 8)
        >>> [name for name, args, error in search(q, k, v, budget=0.2, candidates=CANDIDATES[:1])]
        ['streaming', 'streaming']
    """
    call = Call.of(q, k)
    call.check(q, k, v, name="search")
    H, N = q.shape[1:3]
    if q.shape[0] != 1 or k.shape[2] != N:
        raise InputError(f"search: give one whole sample, got q {list(q.shape)} and k {list(k.shape)}")
    if budget is not None and not 0.0 < budget <= 1.0:
        raise InputError(f"search: budget must be a share in (0, 1] or None, got {budget}")
    if not candidates or rows < 1:
        raise InputError(f"search: needs a candidate and a row, got {len(candidates)} candidates and {rows} rows")
    at = _sample(N, rows, seed).to(q.device)
    probs, dense = _dense(q, k, v, call, at)
    best: list[tuple[str, dict[str, int], float] | None] = [None] * H
    for name, args in candidates:
        waiting = set(range(H))
        for sized in [args] if budget is None else _sizes(args, budget, N):
            method = build(name, sized)
            pattern = method.select(q, k, call)
            fits = [h for h in waiting if budget is None or _cost(method, pattern, call, h) <= budget]
            if fits:
                mask = pattern.mask(call, at.to(pattern.device)).to(q.device)
                error = _error(probs, dense, v, mask)
                for h in fits:
                    held = best[h]
                    if held is None or error[h] < held[2]:
                        best[h] = name, dict(sized), error[h]
            waiting -= set(fits)
            if not waiting:
                break
    found = [entry for entry in best if entry is not None]
    if len(found) < H:
        missing = [h for h, entry in enumerate(best) if entry is None]
        raise InputError(f"search: no candidate costs at most {budget} of {N} tokens on heads {missing}; raise budget")
    return found


def assign(
    layers: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    budget: float | None = 0.1,
    candidates: Sequence[Candidate] = CANDIDATES,
    rows: int = 64,
    seed: int = 0,
) -> list[list[Candidate]]:
    """`search` for captured layers (q, k, v), one after the other: for each layer, for each head, (method, args)."""
    found = []
    for q, k, v in layers:
        heads = search(q, k, v, budget=budget, candidates=candidates, rows=rows, seed=seed)
        found.append([(name, args) for name, args, _ in heads])
    return found


def _sample(length: int, count: int, seed: int) -> Tensor:
    start = length // 8
    drawn = torch.randperm(length - start, generator=torch.Generator().manual_seed(seed))
    return drawn[:count].sort().values + start


def _sizes(args: dict[str, int], budget: float, length: int) -> list[dict[str, int]]:
    """The args scaled to fewer and fewer tokens in all, each time by a fourth root of two."""
    # windows read about budget/2 of the length; columns that stand late cost less, so start well above
    top, whole = min(length, round(8 * budget * length)), sum(args.values())
    sizes: list[dict[str, int]] = []
    for step in range(4 * max(1, top).bit_length() + 1):
        total = top * 2 ** (-step / 4)
        sized = {name: max(1, round(size * total / whole)) for name, size in args.items()}
        if sized not in sizes:
            sizes.append(sized)
    return sizes


def _cost(method: Selector, pattern: Pattern, call: Call, head: int) -> float:
    """Pairs that one head visits or scores, as a share of dense attention."""
    one = call.take((head,), (head * call.shape.G // call.shape.H,))
    return (pattern.heads((head,)).pairs(one) + method.estimate(one)) / Full().pairs(one)


def _dense(q: Tensor, k: Tensor, v: Tensor, call: Call, at: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax weights [1,H,R,N] of some rows, and their outputs [1,H,R,Dv], in float32 or wider."""
    _, H, G, _, M = call.shape
    packed = (q[:, :, at] * call.softmax_scale(q.shape[3])).reshape(1, G, -1, q.shape[3])
    scores = (packed @ k.transpose(-1, -2)).view(1, H, len(at), M)
    scores = scores.masked_fill(~Full().mask(call, at.cpu()).to(q.device), float("-inf"))
    probs = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32))
    return probs, _values(probs, v)


def _error(probs: Tensor, dense: Tensor, v: Tensor, mask: Tensor) -> list[float]:
    """Relative output error of each head when only the masked-in weights stay, renormalised."""
    kept = probs * mask
    # weights that all underflow leave a row without keys, whose output is 0
    o = _values(kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny), v)
    return ((o - dense).norm(dim=(2, 3)) / dense.norm(dim=(2, 3)).clamp_min(1e-12))[0].tolist()


def _values(probs: Tensor, v: Tensor) -> Tensor:
    _, H, R, M = probs.shape
    return (probs.view(1, v.shape[1], -1, M) @ v.to(probs.dtype)).view(1, H, R, -1)
