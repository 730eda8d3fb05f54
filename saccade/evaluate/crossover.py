"""Break-even: the shortest sequence from which on a method's prefill, selection included, is faster than dense."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.table import build
from saccade.evaluate.bench import Case
from saccade.evaluate.presets import arguments
from saccade.methods.base import Selector

LAYERS = 32  # of the model whose arguments are taken: only methods that pick layers look at it


def structured(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose attention has what real heads have: a strong start, a near past, and slow drift in between."""
    rng = torch.Generator().manual_seed(seed)
    N, D = case.length, case.width

    def draw(heads: int) -> Tensor:
        steps = torch.randn(1, heads, -(-N // 64), D, generator=rng).cumsum(2).repeat_interleave(64, 2)[:, :, :N]
        drift = steps / steps.norm(dim=-1, keepdim=True) * D**0.5
        return drift + 0.5 * torch.randn(1, heads, N, D, generator=rng)

    q, k, v = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads)
    k[:, :, :4] = q.mean(2, keepdim=True)[:, :: case.heads // case.kv_heads] * 4
    return tuple(t.to(case.device, case.dtype) for t in (q, k, v))  # type: ignore[return-value]


def crossover(
    method: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    lengths: Iterable[int] = (512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
    repeat: int = 5,
    done: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time one method against SDPA at each length, taking turns.

    Args:
        method: a name of the table; its arguments are those of its preset at each length.
        device: "cpu" (4 query and 2 key heads of width 64) or "cuda" (32 and 8 of width 128).
        dtype: of the tensors.
        lengths: tokens, ascending.
        repeat: turns at each length; medians count.
        done: called with a few words after each length.

    Returns:
        {"method", "device", "dtype", "tokens", "rows": [{"length", "ms", "peer_ms", "speedup"}]}; tokens is where the
        last crossing from slower to faster lies on the line between two lengths, None where there is none.

    Raises:
        InputError: a method that does not serve prefill by saying where to look.
    """
    rows: list[dict[str, float]] = []
    for length in lengths:
        case = Case(length, 0.1, dtype=dtype, device=device)
        if device != "cpu":
            case = Case(length, 0.1, 32, 8, 128, dtype=dtype, device=device)
        selector = build(method, arguments(method, LAYERS, length))
        if not isinstance(selector, Selector) or "prefill" not in selector.phases:
            raise InputError(f"crossover: {method} does not choose where prefill looks")
        q, k, v = structured(case)
        call = Call.of(q, k)

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, call: Call = call, m: Selector = selector) -> None:
            m.attend(q, k, v, call)

        def dense(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        times: tuple[list[float], list[float]] = ([], [])
        with torch.inference_mode():
            for run in (ours, dense):
                _timed(run, device)
            for _ in range(repeat):
                for run, spent in zip((ours, dense), times, strict=True):
                    spent.append(_timed(run, device))
        ms, peer_ms = (median(spent) * 1e3 for spent in times)
        rows.append({"length": length, "ms": round(ms, 3), "peer_ms": round(peer_ms, 3)})
        rows[-1]["speedup"] = round(peer_ms / ms, 3)
        if done is not None:
            done(f"{method}, {length} tokens: {ms:.2f} ms against {peer_ms:.2f} ms")
    name = str(dtype).removeprefix("torch.")
    return {"method": method, "device": device, "dtype": name, "tokens": break_even(rows), "rows": rows}


def break_even(rows: list[dict[str, float]]) -> int | None:
    """Where the speed-up last passes 1, in tokens, on a straight line of logarithms between two lengths.

    Example:
        >>> break_even([{"length": 1024, "speedup": 0.5}, {"length": 4096, "speedup": 2.0}])
        2048
        >>> break_even([{"length": 1024, "speedup": 1.5}])
        1024
        >>> break_even([{"length": 1024, "speedup": 0.9}]) is None
        True
    """
    if not rows or rows[-1]["speedup"] < 1:
        return None
    at = len(rows) - 1
    while at > 0 and rows[at - 1]["speedup"] >= 1:
        at -= 1
    if at == 0:
        return int(rows[0]["length"])
    (x0, y0), (x1, y1) = ((math.log(r["length"]), math.log(r["speedup"])) for r in rows[at - 1 : at + 1])
    return math.ceil(math.exp(x0 - y0 * (x1 - x0) / (y1 - y0)) - 1e-6)


def _timed(run: Callable[[], None], device: str) -> float:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
