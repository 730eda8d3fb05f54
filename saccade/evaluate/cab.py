"""CAB offline: which of four attention patterns a method serves, how true it stays in each, from what length it pays.

The comprehensive attention benchmark (Zhang et al. 2023, arXiv 2210.07661, code: Shark-NLP/CAB) trains models for seven
tasks on data that cannot ship. Here are its four patterns, its compositional index and its efficiency length, for
methods without weights; in the place of scores of trained models stands how far outputs are from dense attention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core.call import Call
from saccade.core.errors import InputError, UnsupportedError
from saccade.core.table import build
from saccade.evaluate.bench import Case
from saccade.evaluate.crossover import LAYERS, structured
from saccade.evaluate.presets import arguments
from saccade.methods.base import Attention
from saccade.methods.controls.dense import Dense

YES = "yes"
FUTURE = "no: earlier outputs depend on later tokens"
PAST = "no: only what comes before is read"


class Kind(NamedTuple):
    """An attention pattern: may a query see what comes after it, and are the keys those of another sequence?"""

    causal: bool
    cross: bool


# a causal cross query sees the whole memory, but must not depend on the queries after it
PATTERNS = {
    "noncausal-self": Kind(False, False),
    "causal-self": Kind(True, False),
    "noncausal-cross": Kind(False, True),
    "causal-cross": Kind(True, True),
}
METRICS = ("error", "worst")
# each reads about a quarter of 512 keys
REFERENCES: dict[str, dict[str, Any]] = {
    "streaming": {"sink": 64, "recent": 64},
    "pooled": {"budget": 128},
    "random": {"budget": 128},
    "oracle": {"budget": 128},
}

# mean and deviation of each metric over `REFERENCES` at 512 tokens, float32: frozen, so that an index means the same
# from version to version; `freeze` made them
CONSTANTS: dict[str, dict[str, tuple[float, float]]] = {
    "noncausal-self": {"error": (0.427103, 0.190873), "worst": (1.027252, 0.349518)},
    "causal-self": {"error": (0.307501, 0.189276), "worst": (0.737587, 0.395429)},
    "noncausal-cross": {"error": (0.406542, 0.252109), "worst": (0.770798, 0.416871)},
    "causal-cross": {"error": (0.406542, 0.252109), "worst": (0.770798, 0.416871)},
}


def support(method: Attention, length: int = 512, seed: int = 0) -> dict[str, str]:
    """Which patterns a method serves, by trying: "yes", or why not.

    Causal: other tokens in the last quarter leave the outputs before them as they are, to a sum of 1e-4. Not causal:
    other keys and values in the last half change outputs of the first half, so that they are read at all. Departs from
    CAB, which cuts later tokens off: budgets that are shares of the length would change with it.

    Args:
        method: without weights.
        length: of the keys; cross queries are a quarter as many.
        seed: of the inputs.

    Example:
        >>> support(Dense())["causal-self"]
        'yes'
    """
    return {name: _tried(method, kind, length, seed) for name, kind in PATTERNS.items()}


def fidelity(method: Attention, kind: Kind, length: int = 512, seed: int = 0) -> dict[str, float]:
    """How far outputs are from dense ones, relative to their size: `error` of all rows, `worst` of the worst 5 %."""
    q, k, v = _inputs(kind, length, seed)
    with torch.inference_mode():
        found, want = (m.attend(q, k, v, _call(kind, q, k, seed)).o.double() for m in (method, Dense()))
    off = (found - want).norm(dim=-1).flatten()
    size = want.norm() / len(off) ** 0.5
    worst = off.topk(max(len(off) // 20, 1)).values
    return {"error": float(off.norm() / want.norm()), "worst": float(worst.mean() / size)}


def card(name: str, length: int = 512) -> dict[str, Any]:
    """What CAB says of a method: `support` in words, `index` in the patterns that it serves.

    Args:
        name: of the table; its arguments are those of its preset, but that support is tried with half of the keys where
            the budget is a share: of a twentieth, nothing may lie on the other side by chance.
        length: of the keys; the frozen constants are those of 512.

    Example:
        >>> round(card("oracle")["index"]["noncausal-self"], 1) > 0
        True
    """
    given = arguments(name, LAYERS, length)
    method = build(name, given)
    told = support(build(name, given | {"budget": 0.5}) if isinstance(given.get("budget"), float) else method, length)
    scores = {pattern: fidelity(method, PATTERNS[pattern], length) for pattern, said in told.items() if said == YES}
    return {"method": name, "support": told, "index": index(scores)}


def freeze(scores: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and deviation of each metric in each pattern over reference methods: what `index` compares with.

    Args:
        scores: pattern -> metric -> value, one for each reference.

    Example:
        >>> freeze([{"causal-self": {"error": 0.1}}, {"causal-self": {"error": 0.3}}])
        {'causal-self': {'error': (0.2, 0.1)}}
    """
    frozen: dict[str, dict[str, tuple[float, float]]] = {}
    for pattern in dict.fromkeys(name for one in scores for name in one):
        known = [one[pattern] for one in scores if pattern in one]
        frozen[pattern] = {
            metric: (round(fmean(one[metric] for one in known), 6), round(pstdev(one[metric] for one in known), 6))
            for metric in known[0]
        }
    return frozen


def index(
    scores: dict[str, dict[str, float]],
    constants: dict[str, dict[str, tuple[float, float]]] = CONSTANTS,
    higher: Sequence[str] = (),
) -> dict[str, float]:
    """The compositional index: in each pattern the mean of (value - mean) / deviation over metrics, above 0 = better.

    Args:
        scores: pattern -> metric -> value.
        constants: pattern -> metric -> (mean, deviation), from `freeze`.
        higher: metrics where more is better; the sign of all others is turned.

    Raises:
        InputError: a pattern or metric without constants, or one in which the references do not differ.

    Example:
        >>> index({"causal-self": {"error": 0.1}}, {"causal-self": {"error": (0.2, 0.05)}})
        {'causal-self': 2.0}
    """
    found = {}
    for pattern, metrics in scores.items():
        parts = []
        for metric, value in metrics.items():
            mean, deviation = constants.get(pattern, {}).get(metric, (0.0, 0.0))
            if deviation <= 0:
                raise InputError(f"cab: no frozen constants for {metric} in {pattern}; known are {constants}")
            parts.append((value - mean) / deviation * (1 if metric in higher else -1))
        found[pattern] = fmean(parts)
    return found


def efficiency_length(
    lengths: Sequence[float], dense: Sequence[float], method: Sequence[float], degree: int = 1
) -> float | None:
    """From what length on a method costs less: where a parabola through dense costs last crosses the method's line.

    Args:
        lengths: tokens, three or more different ones.
        dense: seconds or bytes of dense attention at each.
        method: the same of the method; None where a cost is to be left out.
        degree: of the method's polynomial, 1 as in CAB, 2 for methods that are not linear.

    Returns:
        Tokens; 0.0 where the method costs less at every length, None where it never does from some length on.

    Raises:
        InputError: too few lengths.

    Example:
        >>> efficiency_length([1, 2, 3, 4], [1, 4, 9, 16], [2, 4, 6, 8])
        2.0
    """
    import numpy as np

    if len(set(lengths)) < 3 or not len(lengths) == len(dense) == len(method):
        raise InputError(f"cab: needs costs at three lengths or more, got {list(lengths)}")
    kept = [(n, cost) for n, cost in zip(lengths, method, strict=True) if cost is not None]
    parabola = np.polyfit(np.asarray(lengths, float), np.asarray(dense, float), 2)
    line = np.polyfit([n for n, _ in kept], [cost for _, cost in kept], degree)
    # what dense attention costs more
    more = np.polysub(parabola, line)
    scale = max(abs(cost) for cost in dense) / max(lengths) ** 2
    if more[0] <= 1e-9 * scale:
        return None
    real = [float(root.real) for root in np.roots(more) if abs(root.imag) < 1e-9 * max(lengths)]
    return round(max([0.0, *real]), 6)


def clocked(run: Callable[[], Any], device: str = "cpu", runs: int = 100) -> float:
    """Seconds of a call: the mean of the middle half of many, each of them waited for to its end.

    Departs from CAB, whose clock stops before the device has finished.
    """
    taken = []
    run()
    for _ in range(runs):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        taken.append(time.perf_counter() - start)
    cut = len(taken) // 4
    return fmean(sorted(taken)[cut : len(taken) - cut])


def efficiency(
    name: str,
    device: str = "cpu",
    lengths: Sequence[int] = (256, 512, 1024, 2048, 4096, 8192),
    *,
    causal: bool = True,
    batch: int = 4,
    heads: int = 8,
    width: int = 64,
    runs: int = 100,
) -> dict[str, Any]:
    """Time a method and dense attention at each length, taking turns, and find the efficiency length.

    Args:
        name: of the table; its arguments are those of its preset at each length.
        device: where to.
        lengths: tokens; the first is left out of the method's line, as in CAB.
        causal: causal or noncausal self-attention.
        batch, heads, width: of the tensors; 8 heads of 64 make CAB's width of 512.
        runs: of each, the middle half counts.

    Returns:
        {"method", "device", "lengths", "dense_s", "method_s", "tokens"}.
    """
    dense_s, method_s = [], []
    for length in lengths:
        method = build(name, arguments(name, LAYERS, length))
        rng = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(batch, heads, length, width, generator=rng).to(device) for _ in range(3))
        with torch.inference_mode():
            for one, found in ((Dense(), dense_s), (method, method_s)):
                call = Call.of(q, k, causal=causal)
                found.append(clocked(lambda m=one, c=call, t=(q, k, v): m.attend(*t, c), device, runs))
    tokens = efficiency_length(lengths, dense_s, [None, *method_s[1:]])  # type: ignore[list-item]
    row: dict[str, Any] = {"method": name, "device": device, "lengths": list(lengths), "dense_s": dense_s}
    return row | {"method_s": method_s, "tokens": tokens}


def _tried(method: Attention, kind: Kind, length: int, seed: int) -> str:
    rng = torch.Generator().manual_seed(seed)
    # nothing stands out, so that all blocks have a chance to be chosen
    q, k, v = (torch.randn(1, heads, length, 32, generator=rng) for heads in (4, 2, 2))
    q = q[:, :, : length // 4] if kind.cross else q
    first = q.shape[2] * 3 // 4

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return method.attend(q, k, v, _call(kind, q, k, seed)).o

    def changed(t: Tensor, start: int) -> Tensor:
        return torch.cat((t[:, :, :start], torch.randn(t[:, :, start:].shape, generator=rng)), 2)

    try:
        with torch.inference_mode():
            before = run(q, k, v)
            if kind.causal and kind.cross:
                after = run(changed(q, first), k, v)
            elif kind.causal:
                after = run(changed(q, first), changed(k, first), changed(v, first))
            else:
                after = run(q, changed(k, length // 2), changed(v, length // 2))
    except (UnsupportedError, InputError) as error:
        return f"refused: {error}"
    if not (bool(before.isfinite().all()) and before.shape == (*q.shape[:3], v.shape[3])):
        return "no: outputs are not numbers, or not of the right shape"
    if kind.causal:
        return YES if float((before - after)[:, :, :first].abs().sum()) <= 1e-4 else FUTURE
    return YES if bool((before != after)[:, :, : q.shape[2] // 2].any()) else PAST


def _inputs(kind: Kind, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = structured(Case(length, 0.1, 4, 2, 32), seed)
    if kind.cross:
        # queries of another sequence look for anything that the keys hold
        q = q[:, :, torch.randperm(length, generator=torch.Generator().manual_seed(seed))[: length // 4]]
    return q, k, v


def _call(kind: Kind, q: Tensor, k: Tensor, seed: int) -> Call:
    rng = torch.Generator().manual_seed(seed)
    return Call.of(q, k, causal=kind.causal and not kind.cross, rng=rng)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
